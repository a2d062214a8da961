"""Every CUDA kernel of the cupy backend compiled to SASS for every architecture: no spills, the instructions meant.

A choice of them by default; `pytest -n auto tests/compile --every-kernel` has all, about half an hour on two cores.
"""

from __future__ import annotations

import dataclasses

import pytest
from cuda_builds import NAMES, NVCC, build, complaints

from flash2.backends.cupy_cuda import launch
from flash2.core.problem import Problem

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

FEATURES = {
    "plain": {},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 30.0},
    "dressed": {"softcap": 30.0, "alibi": True},
    "negative": {"scale": -0.1},
}
# Where Hopper's forward has tiles of their own.
HOPPER = {"long": {"seq_q": 4096}, "causal": {"causal": True}, "long-causal": {"causal": True, "seq_q": 4096}}
KERNELS = ("forward", "statistics", "gradients_kv", "gradients_q")
# Where both sides' gradients have one kernel: IEEE arithmetic, if its tiles fit into shared memory.
BOTH = [(arch, head_dim) for arch in NAMES for head_dim in (64, 128) if head_dim == 64 or arch in (90, 100)]
MATRIX = (
    {
        f"sm{arch}-{precision}-d{head_dim}-{feature}-{kernel}": (arch, precision, head_dim, feature, kernel)
        for arch in NAMES
        for precision, family in launch.FAMILIES.items()
        for head_dim in family.head_dims
        for feature in FEATURES
        for kernel in KERNELS
        if feature == "plain" or kernel != "statistics"
    }
    | {
        f"sm{arch}-ieee-d{head_dim}-{feature}-{kernel}": (arch, "ieee", head_dim, feature, kernel)
        for arch, head_dim in BOTH
        for feature in FEATURES
        for kernel in ("gradients", "gradients_sum")
        if feature == "plain" or kernel == "gradients"
    }
    | {
        f"sm90-{precision}-d{head_dim}-{feature}-forward": (90, precision, head_dim, feature, "forward")
        for precision in ("fp16", "bf16")
        for head_dim in (64, 128)
        for feature in HOPPER
    }
)
CHOICE = [
    "sm90-bf16-d64-plain-forward",
    "sm90-bf16-d128-plain-forward",
    "sm90-bf16-d64-long-forward",
    "sm90-fp16-d128-causal-forward",
    "sm90-bf16-d64-long-causal-forward",
    "sm90-bf16-d256-plain-forward",
    "sm90-bf16-d64-plain-gradients_kv",
    "sm90-bf16-d128-plain-gradients_q",
    "sm90-bf16-d64-plain-statistics",
    "sm90-tf32-d64-plain-forward",
    "sm90-ieee-d64-plain-forward",
    "sm90-ieee-d64-plain-gradients",
    "sm90-ieee-d128-plain-gradients",
    "sm80-ieee-d64-plain-gradients_sum",
    "sm80-fp16-d192-softcap-gradients_kv",
    "sm80-tf32-d128-alibi-gradients_q",
    "sm80-bf16-d96-dressed-forward",
    "sm100-fp16-d256-negative-forward",
    "sm100-tf32-d64-plain-gradients_kv",
    "sm120-bf16-d32-plain-forward",
    "sm120-ieee-d256-plain-gradients_q",
]


# Open: IEEE arithmetic with all 255 registers in use. dK, dV hold three tiles of 64 floats a thread, and other assemblers
# than sm_90's need some registers more for ALiBi. After sm_90 they do so in the other kernels too, once they have softcap
# or ALiBi.
DRESSED = ("alibi", "softcap", "dressed")
SPILLING = {
    name
    for name, (arch, precision, _, feature, kernel) in MATRIX.items()
    if precision == "ieee"
    and (
        (kernel == "gradients_kv" and arch != 90 and feature in ("alibi", "dressed"))
        or (kernel == "gradients" and (arch, feature) in ((80, "alibi"), (120, "softcap"), (120, "dressed")))
        or (kernel in ("forward", "gradients_q") and arch > 90 and feature in DRESSED)
    )
}


def kernel_of(arch: int, precision: str, head_dim: int, feature: str, name: str, pins=None) -> launch.Kernel:
    """The kernel that such a problem launches."""
    dtype = precision if precision in ("fp16", "bf16") else "fp32"
    fields = {"seq_q": 512, "pass_": "fwd+bwd", **{**FEATURES, **HOPPER}[feature]}
    maths = launch.maths_of(Problem(heads_q=2, head_dim=head_dim, dtype=dtype, precision=precision, **fields), arch)
    return maths.kernel(name, pins or {})


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        names = list(MATRIX) if metafunc.config.getoption("every_kernel") else CHOICE
        known = pytest.mark.xfail(reason="registers spill")
        cells = [pytest.param(MATRIX[name], marks=[known] if name in SPILLING else [], id=name) for name in names]
        metafunc.parametrize("cell", cells)


def test_shipped(cell):
    arch, precision, *_ = cell
    kernel = kernel_of(*cell)
    assert not complaints(build(kernel, arch), kernel, precision, arch)


# ---- the check itself


def test_the_choice_covers_the_matrix():
    """No axis of the matrix has a value that only --every-kernel compiles."""
    chosen, whole = zip(*(MATRIX[name] for name in CHOICE), strict=True), zip(*MATRIX.values(), strict=True)
    for some, every in zip(chosen, whole, strict=True):
        assert set(some) == set(every)


# bug -> (cell, pinned tile, the class it is checked as, what is said)
PLANTED = {
    "a tile that spills": ("sm80-bf16-d128-plain-forward", "128x128 w4 s2", "bf16", "spilled"),
    "wgmma in too few registers": ("sm90-bf16-d64-plain-forward", "wgmma 192x128 s2 q1 qreg", "bf16", "serialized"),
    "mma.sync checked as something else": (
        "sm90-bf16-d64-plain-forward",
        "128x64 w4 s2",
        "ieee",
        "['HMMA'] where none",
    ),
    "one with too much shared memory": ("sm120-bf16-d128-plain-forward", "128x64 w4 s4", "bf16", "shared memory"),
    "tensor cores in IEEE arithmetic": ("sm80-tf32-d32-plain-gradients_q", None, "ieee", "['HMMA'] where none"),
    "TF32 without tensor cores": ("sm80-ieee-d64-plain-gradients_q", None, "tf32", "none where ['HMMA']"),
    "a tile that is no tile": ("sm80-bf16-d64-plain-forward", "24x64 w4 s2", "bf16", "whole mma blocks"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_violation_is_found(bug):
    name, tile, checked_as, says = PLANTED[bug]
    cell = MATRIX[name]
    kernel = kernel_of(*cell, pins={cell[-1]: launch.parse_tile(tile)} if tile else None)
    found = complaints(build(kernel, cell[0]), kernel, checked_as, cell[0])
    assert any(says in what for what in found), found


def test_exponentials_behind_the_wait_are_found():
    pins = {"forward": launch.parse_tile("wgmma 128x128 s2 q2 turns")}
    kernel = kernel_of(*MATRIX["sm90-bf16-d128-plain-forward"], pins=pins)
    built = build(kernel, 90)
    assert not complaints(built, kernel, "bf16", 90)
    kernel.tile = dataclasses.replace(kernel.tile, ordered=True)
    assert complaints(built, kernel, "bf16", 90) == ["0 exponentials beside the product of P and V"]
