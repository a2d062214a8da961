"""Every shipped kernel compiled to SASS for every architecture: no spills, and the instructions that are meant.

A choice of them by default; `pytest -n auto tests/compile --every-kernel` has all, about an hour on two cores.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):  # open: what other versions make of them
    pytest.skip(f"registers and spills are those of triton 3.6, this is {triton.__version__}", allow_module_level=True)

import builds  # noqa: E402
from builds import FEATURES, PRECISIONS, TENSOR_CORE, compiled, complaints, problem_of, shipped  # noqa: E402

from flash2.backends.triton_fa2 import offline  # noqa: E402
from flash2.backends.triton_fa2.configs import TileConfig  # noqa: E402

HEAD_DIMS = (32, 64, 128, 256)
MATRIX = {
    f"sm{arch}-{precision}-d{head_dim}-{feature}-{pass_}": (arch, precision, head_dim, feature, pass_)
    for arch in TENSOR_CORE
    for precision in PRECISIONS
    for head_dim in HEAD_DIMS
    for feature in FEATURES
    for pass_ in ("fwd", "bwd")
}
# Each kernel on each architecture and in each class, each feature, each head_dim.
CHOICE = [
    "sm90-bf16-d64-full-fwd",
    "sm90-bf16-d128-causal-fwd",
    "sm90-bf16-d256-all-fwd",
    "sm90-fp16-d128-full-rest-fwd",
    "sm90-tf32-d64-causal-fwd",
    "sm90-bf16x6-d64-full-fwd",
    "sm90-bf16x3-d64-window-fwd",
    "sm90-tf32x3-d64-causal-fwd",
    "sm90-ieee-d64-full-fwd",
    "sm90-bf16-d64-causal-bwd",
    "sm90-bf16-d128-all-bwd",
    "sm90-bf16-d256-full-bwd",
    "sm90-bf16-d64-causal-short-fwd",
    "sm90-tf32-d64-full-short-bwd",
    "sm90-bf16x6-d64-causal-bwd",
    "sm90-tf32-d64-full-bwd",
    "sm90-ieee-d64-alibi-bwd",
    "sm80-bf16-d128-causal-rest-fwd",
    "sm80-tf32-d64-softcap-fwd",
    "sm80-ieee-d32-causal-fwd",
    "sm80-fp16-d64-causal-bwd",
    "sm100-bf16-d128-causal-fwd",
    "sm100-tf32-d64-full-fwd",
    "sm100-ieee-d64-full-fwd",
    "sm100-bf16-d64-full-bwd",
    "sm120-fp16-d64-window-fwd",
    "sm120-bf16x3-d64-full-fwd",
    "sm120-bf16-d64-all-rest-bwd",
]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        names = list(MATRIX) if metafunc.config.getoption("every_kernel") else CHOICE
        cells = [pytest.param(MATRIX[name], id=name) for name in names]
        metafunc.parametrize("cell", cells)


def test_shipped(cell):
    arch, precision, *_ = cell
    problem = problem_of(*cell[1:])
    configurations = shipped(problem, arch)
    pins = {kernel: config for kernel, (config, _) in configurations.items()}
    found = []
    for kernel in offline.planned(problem, pins):
        config, from_table = configurations.get(kernel, ("", False))
        build = compiled(problem, kernel, pins, arch)
        wrong = complaints(build, arch, None if kernel == "statistics" else precision, meant=from_table)
        found += [f"{kernel} ({config}): {what}" for what in wrong]
    assert not found, "\n".join(found)


# ---- the check itself


def test_the_choice_covers_the_matrix():
    """No axis of the matrix has a value that only --every-kernel compiles."""
    chosen, whole = zip(*(MATRIX[name] for name in CHOICE), strict=True), zip(*MATRIX.values(), strict=True)
    for some, every in zip(chosen, whole, strict=True):
        assert set(some) == set(every)


BIG = TileConfig(block_m=128, block_n=128, num_warps=4, num_stages=2)
PLANTED = {
    "a configuration that spills": ("bf16", {"fwd": BIG}, 90, "bf16", "registers spill"),
    "one with too much shared memory": ("bf16", {"fwd": BIG.replace(num_warps=8, num_stages=4)}, 80, "bf16", "shared memory"),
    "an ieee kernel compiled as tf32": ("tf32", {}, 90, "ieee", "HGMMA in ieee arithmetic"),
    "a tf32 kernel compiled as ieee": ("ieee", {}, 90, "tf32", "no tensor core instruction where HGMMA is meant"),
    "a tile too small for wgmma": (
        "bf16", {"fwd": TileConfig(block_m=32, block_n=32)}, 90, "bf16", "HMMA where HGMMA is meant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_violation_is_found(bug):
    precision, pins, arch, checked_as, says = PLANTED[bug]
    problem = problem_of(precision, 128 if pins else 64, "full", "fwd")
    pins = {kernel: config for kernel, (config, _) in shipped(problem, arch).items()} | pins
    found = complaints(compiled(problem, "fwd", pins, arch), arch, checked_as)
    assert any(says in what for what in found), found


def test_a_kernel_that_does_not_compile_is_found(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(builds.offline, "build", fails)
    problem = problem_of("bf16", 64, "full", "fwd")
    pins = {kernel: config for kernel, (config, _) in shipped(problem, 90).items()}
    assert complaints(compiled(problem, "fwd", pins, 90), 90, "bf16") == [
        "does not compile: RuntimeError: no such tile"
    ]
