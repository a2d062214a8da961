"""Build a planned kernel for any GPU, with or without having one, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from flash2.backends.triton_fa2 import launch
from flash2.core.contract import TORCH_DTYPES, spec_of
from flash2.core.problem import Problem

# Bytes of shared memory one block may use (CUDA C programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def shared_limit(arch: int) -> int:
    """SHARED_LIMIT of compute capability `arch` (90 for 9.0), or of the nearest older one."""
    return SHARED_LIMIT[max((known for known in SHARED_LIMIT if known <= arch), default=min(SHARED_LIMIT))]


@dataclass(frozen=True, slots=True)
class Build:
    """What one kernel compiled to: 32-bit registers a thread, bytes of local memory (spills), of shared memory a
    block, how often each SASS instruction stands in it, and the SASS."""

    registers: int
    spills: int
    shared: int
    instructions: Counter[str] = field(repr=False)
    listing: str = field(repr=False, default="")


def planned(problem: Problem, pins: launch.Pins) -> dict[str, tuple[launch.Launch, tuple]]:
    """kernel name -> (its launch, its tensors) for dense tensors that hold nothing, aligned as a call would; pins name the configurations."""
    dtype = TORCH_DTYPES[problem.dtype]
    with torch.device("meta"):
        q = launch.aligned(torch.empty(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype))
        k = launch.aligned(torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype))
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        slopes = torch.empty(problem.heads_q, dtype=torch.float32) if problem.alibi else None
    spec = spec_of(problem, slopes)
    plans = {}
    if problem.pass_ != "bwd":
        plans["fwd"] = launch.plan_forward(q, k, k, q, spec, pins), (q, k, k, q, lse, slopes)
    if problem.pass_ != "fwd":
        plan = launch.plan_backward(q, q, k, k, q, q, k, k, spec, pins)
        rows = torch.empty(q.shape[0] * q.shape[1], plan.rows_padded, dtype=torch.float32, device="meta")
        plans["statistics"] = plan.statistics, (q, q, lse, rows, rows)
        for name, kv in plan.kv.items():
            plans[name] = kv, (q, k, k, q, rows, rows, k, k, slopes)
        plans["dq"] = plan.q, (q, k, k, q, rows, rows, q, slopes)
    return {name: resolved(*plan) for name, plan in plans.items()}


def resolved(planned_launch: launch.Launch | launch.Prepared, tensors: tuple) -> tuple[launch.Launch, tuple]:
    """(launch, tensors) as the launch gets them, with stand-ins for what the kernels before it write."""
    if isinstance(planned_launch, launch.Launch):
        return planned_launch, tensors
    steps, more = planned_launch.steps, planned_launch.more
    read = (steps[n].empty(x) if n in steps else x for n, x in enumerate(tensors))
    return planned_launch.launch, (*read, *(step and step.empty(tensors[n]) for n, step in more.items()))


def build(planned_launch: launch.Launch, tensors: tuple, arch: int, *, sass: bool = True) -> Build:
    """Compile one launch for compute capability `arch` (90 for 9.0), as Triton's own dispatch would, so that a
    later launch finds it in Triton's cache. Without `sass`, the instructions are not read.

    Raises what the compiler raises, for instance when a tile asks for more than it can do.
    """
    kernel, target = planned_launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    arguments, options = planned_launch.arguments(tensors)
    options = {**options, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, **options
    )
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)
    return read(compiled.asm["cubin"], compiled.metadata.shared, sass)


def read(cubin: bytes, shared: int, sass: bool = True) -> Build:
    """Registers, spills and instructions of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", file)
        listing = _cuobjdump("-sass", file) if sass else ""
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instructions = Counter(
        re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)", listing, re.MULTILINE)
    )
    bases: Counter[str] = Counter()
    for name, count in instructions.items():
        bases[name.partition(".")[0]] += count
    return Build(registers, stack + local, shared, bases, listing)


def _cuobjdump(option: str, file: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout
