"""The cupy backend's CUDA sources run on a CPU by tests/mma_on_cpu.cpp: slow, and exact in what they index and mask.

`--backends tests/cuda_on_cpu.py:CudaOnCPU` gives it to the contract suite.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from flash2.backends.cupy_cuda import CupyCuda, compile, launch

EMULATOR = Path(__file__).parent / "mma_on_cpu.cpp"
ARCH = 80  # the kernels of any GPU
COMPILER = shutil.which("g++")


class CudaOnCPU(CupyCuda):
    """CupyCuda without a GPU: the same plans, parameters and sources."""

    name = "cuda-on-cpu"
    capability = dataclasses.replace(CupyCuda.capability, devices=("cpu",), min_arch=None)

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.plan = EagerPlan if eager else HostPlan

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

    def _on_cpu(self):
        return mock.patch.multiple(launch, Plan=self.plan, arch_of=lambda device: ARCH, _plans={})


class HostPlan(launch.Plan):
    """Runs its kernels where it is; RuntimeError with what a kernel did that a GPU forbids."""

    eager = False

    def __call__(self, *pointers: int) -> None:
        launch.POINTERS.pack_into(self.buffer, 0, *pointers)
        params = ctypes.c_void_p(ctypes.addressof(self.buffer))
        for kernel in self.kernels:
            run = library(kernel.source, launch.ENTRIES[kernel.name], kernel.defines).launch
            run.restype = ctypes.c_char_p
            if failure := run(params, kernel.grid, int(self.eager)):
                raise RuntimeError(f"{kernel.source}: {failure.decode()}")


class EagerPlan(HostPlan):
    """Copies to shared memory are made at once."""

    eager = True


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
    texts = [EMULATOR, *(compile.SOURCES / name for name in (source, *compile.headers(source)))]
    name = hashlib.sha256("\0".join([*flags, *(path.read_text() for path in texts)]).encode()).hexdigest()[:24]
    path = folder() / f"{name}.so"
    if not path.exists():
        made = f"{path}.{os.getpid()}"
        command = [COMPILER, "-std=c++17", "-O1", "-march=native", "-w", "-shared", "-fPIC", f"-I{compile.SOURCES}"]
        done = subprocess.run([*command, *flags, str(EMULATOR), "-o", made], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        os.replace(made, path)
    return ctypes.CDLL(str(path))
