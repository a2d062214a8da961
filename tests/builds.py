"""The Triton kernels as shipped, compiled for GPUs that need not be there, and what is wrong with the outcome."""

from __future__ import annotations

import os
from unittest import mock

import torch

from flash2.backends.triton_fa2 import configs, launch, offline
from flash2.backends.triton_fa2.configs import TileConfig
from flash2.backends.triton_fa2.offline import Build
from flash2.core.contract import TORCH_DTYPES, spec_of
from flash2.core.problem import Problem

# Compute capability -> its matrix instruction in SASS: mma of Ampere, wgmma of Hopper, tcgen05.mma of Blackwell's
# data centre chips, and mma again of its others. On every one FFMA is the plain float32 multiply-add.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
PRECISIONS = ("bf16", "fp16", "tf32", "tf32x3", "bf16x3", "bf16x6", "ieee")
# What a problem may ask of a kernel. "-rest": lengths and a head_dim that fill no tile, without tensor descriptors.
REST = {"seq_q": 2047, "seq_kv": 2045}
FEATURES = {
    "full": {},
    "full-rest": REST,
    "full-short": {"seq_q": 512},
    "causal": {"causal": True},
    "causal-rest": {"causal": True, **REST},
    "causal-short": {"causal": True, "seq_q": 512},
    "window": {"causal": True, "window": (512, 0)},
    "softcap": {"softcap": 30.0},
    "alibi": {"causal": True, "alibi": True},
    "all": {"causal": True, "window": (512, 0), "softcap": 30.0, "alibi": True},
    "all-rest": {"window": (512, 512), "softcap": 30.0, "alibi": True, **REST},
}


def problem_of(precision: str, head_dim: int, feature: str, pass_: str) -> Problem:
    """The problem of one cell; one with a rest has a head_dim that is no power of two, with odd rows."""
    dtype = precision if precision in ("bf16", "fp16") else "fp32"
    size = head_dim - 3 if feature.endswith("-rest") else head_dim
    fields = {"seq_q": 2048, **FEATURES[feature]}
    return Problem(heads_q=4, heads_kv=2, head_dim=size, dtype=dtype, precision=precision, pass_=pass_, **fields)


def complaints(build: Build | str, arch: int, precision: str | None, *, meant: bool = True) -> list[str]:
    """What is wrong with a kernel of class `precision` (None: it multiplies no matrices) for `arch`, in words.

    `meant`: its tiles were chosen for this arch, so every product of 16-bit or TF32 operands runs on its own matrix
    instruction. A fallback may multiply with an older one, but not without.
    """
    if isinstance(build, str):
        return [build]
    found = []
    if build.spills:
        found.append(f"{build.spills} bytes of local memory: registers spill ({build.registers} in use)")
    if build.shared > offline.SHARED_LIMIT[arch]:
        found.append(f"{build.shared} bytes of shared memory, sm_{arch} has {offline.SHARED_LIMIT[arch]} a block")
    used = sorted(name for name in build.instructions if name.endswith("MMA"))
    wanted = TENSOR_CORE[arch]
    if precision is None:
        return found
    if precision == "ieee":
        if used:
            found.append(f"{', '.join(used)} in ieee arithmetic")
        if not any(name.startswith("FFMA") for name in build.instructions):
            found.append("no FFMA in ieee arithmetic")
    elif not used:
        found.append(f"no tensor core instruction where {wanted} is meant")
    elif meant and used != [wanted]:
        found.append(f"{', '.join(used)} where {wanted} is meant")
    return found


def shipped(problem: Problem, arch: int) -> dict[str, tuple[TileConfig, bool]]:
    """kernel -> (the configuration that `problem` runs with on `arch` out of the box, is it a row of its table?)."""
    with torch.device("meta"):
        dtype = TORCH_DTYPES[problem.dtype]
        q = launch.aligned(torch.empty(1, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype))
        k = launch.aligned(torch.empty(1, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype))
        slopes = torch.empty(problem.heads_q) if problem.alibi else None
    found = {}
    with (
        mock.patch.object(launch, "arch_of", return_value=f"sm{arch}"),
        mock.patch.object(torch.cuda, "get_device_name", return_value="nobody's"),  # so nobody tuned for it
        mock.patch.dict(os.environ, FLASH2_TRITON_TUNE="0"),
    ):
        maths = launch.Maths(q, k, spec_of(problem, slopes))
        for kernel in configs.KERNELS:
            config = maths.config(kernel, {}, (q, k, k) if kernel == "fwd" else (q, k, k, q))
            found[kernel] = config, maths.chosen(kernel) == (config, "table")
    return found


def compiled(problem: Problem, kernel: str, pins: launch.Pins, arch: int) -> Build | str:
    """One kernel of `problem` in the configurations `pins`, or what its compiler says."""
    planned, tensors = offline.planned(problem, pins)[kernel]
    try:
        return offline.build(planned, tensors, arch)
    except Exception as error:  # whatever a compiler of this size raises or asserts is the test's failure
        return f"does not compile: {type(error).__name__}: {str(error)[:300]}"
