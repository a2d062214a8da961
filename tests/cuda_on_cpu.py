"""The cupy backend's CUDA sources run on a CPU by tests/mma_on_cpu.cpp and hopper_on_cpu.hpp: slow, and exact in what they
index, mask and wait for.

`--backends tests/cuda_on_cpu.py:CudaOnCPU,tests/cuda_on_cpu.py:HopperOnCPU` gives it to the contract suite.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch

from flash2.backends.cupy_cuda import CupyCuda, compile, hopper, launch

EMULATOR = (Path(__file__).parent / "mma_on_cpu.cpp", Path(__file__).parent / "hopper_on_cpu.hpp")
PROCESSORS = 3  # so that a persistent block has several row tiles
COMPILER = shutil.which("g++")


class CudaOnCPU(CupyCuda):
    """CupyCuda without a GPU: the same plans, parameters and sources, as for compute capability `arch`."""

    name = "cuda-on-cpu"
    capability = dataclasses.replace(CupyCuda.capability, devices=("cpu",), min_arch=None)

    def __init__(self, eager: bool = False, arch: int = 80) -> None:
        super().__init__()
        self.eager, self.arch = eager, arch

    def unavailable(self):
        return None if COMPILER else "no g++"

    def details(self, problem, device):
        return []

    def forward(self, q, k, v, spec):
        with self._on_cpu():
            return super().forward(q, k, v, spec)

    def backward(self, do, q, k, v, o, lse, spec):
        with self._on_cpu():
            return super().backward(do, q, k, v, o, lse, spec)

    @contextlib.contextmanager
    def _on_cpu(self):
        def run(plan, *pointers):
            plan.fill(pointers)
            run_all(plan, self.eager)

        with (
            mock.patch.object(launch.Plan, "__call__", run),
            mock.patch.multiple(
                launch, arch_of=lambda device: self.arch, processors_of=lambda device: PROCESSORS, _plans={}
            ),
            mock.patch.multiple(hopper, encode=encode, mover=lambda: move),
        ):
            yield


class HopperOnCPU(CudaOnCPU):
    """With Hopper's forward."""

    name = "hopper-on-cpu"
    capability = dataclasses.replace(CudaOnCPU.capability, precisions={"fp16": ("fp16",), "bf16": ("bf16",)})

    def __init__(self, eager: bool = False) -> None:
        super().__init__(eager, arch=90)


def run_all(plan: launch.Plan, eager: bool) -> None:
    """Run a plan's kernels; RuntimeError with what one did that a GPU forbids."""
    for kernel in plan.kernels:
        run = library(kernel.source, launch.ENTRIES[kernel.name], kernel.defines).launch
        run.restype = ctypes.c_char_p
        if failure := run(plan.pointer, kernel.grid, int(eager)):
            raise RuntimeError(f"{kernel.source}: {failure.decode()}")


def encode(address: int, x: torch.Tensor, rows: int) -> None:
    """Stands for the driver's: a map as hopper_on_cpu.hpp reads it."""
    assert address % 64 == 0 and hopper.describable(x)
    strides = [2 * s for s in reversed(x.stride()[:3])]
    content = struct.pack("16Q", x.data_ptr(), *reversed(x.shape), *strides, rows, *[0] * 7)
    ctypes.memmove(address, content, len(content))


def move(address: int, pointer: int) -> int:
    """Stands for the driver's cuTensorMapReplaceAddress."""
    ctypes.memmove(address, struct.pack("Q", pointer), 8)
    return 0


@functools.cache
def folder() -> Path:
    """Of the compiled libraries; FLASH2_CUDA_ON_CPU keeps them from run to run."""
    kept = os.environ.get("FLASH2_CUDA_ON_CPU")
    if kept:
        Path(kept).mkdir(exist_ok=True, parents=True)
        return Path(kept)
    path = tempfile.mkdtemp(prefix="cuda_on_cpu")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def library(source: str, entry: str, defines: Mapping[str, int]) -> ctypes.CDLL:
    """`source` compiled for this machine; `launch(params, grid, eager)` runs it."""
    flags = ["-DON_CPU", f'-DSOURCE="{source}"', f"-DENTRY={entry}", *(f"-D{k}={v}" for k, v in defines.items())]
    texts = [*EMULATOR, *(compile.SOURCES / name for name in (source, *compile.headers(source)))]
    name = hashlib.sha256("\0".join([*flags, *(path.read_text() for path in texts)]).encode()).hexdigest()[:24]
    path = folder() / f"{name}.so"
    if not path.exists():
        made = f"{path}.{os.getpid()}"
        command = [COMPILER, "-std=c++17", "-O1", "-march=native", "-w", "-shared", "-fPIC", f"-I{compile.SOURCES}"]
        done = subprocess.run([*command, *flags, str(EMULATOR[0]), "-o", made], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        os.replace(made, path)
    return ctypes.CDLL(str(path))
