"""The Gluon backward compiled to SASS for sm_90: no spills, wgmma and TMA where they are meant, shared memory that fits.

A choice of the features by default; `pytest -n auto tests/compile --every-kernel` has all.
"""

from __future__ import annotations

from itertools import product

import pytest

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):  # open: what other versions make of them
    pytest.skip(f"registers and spills are those of triton 3.6, this is {triton.__version__}", allow_module_level=True)

from flash2.backends.gluon_hopper import gradients, offline  # noqa: E402
from flash2.backends.triton_fa2.offline import SHARED_LIMIT, Build, read  # noqa: E402
from flash2.core.problem import Problem  # noqa: E402

# What a problem may ask of a kernel. "-rest": lengths and a head_dim that fill no tile.
REST = {"seq_q": 2047, "seq_kv": 2045}
FEATURES = {
    "full": {},
    "full-rest": REST,
    "causal": {"causal": True},
    "causal-rest": {"causal": True, **REST},
    "causal-short": {"causal": True, "seq_q": 512},
    "gqa": {"heads_kv": 2},
    "gqa-causal": {"heads_kv": 2, "causal": True},
    "window": {"causal": True, "window": (512, 0)},
    "softcap": {"softcap": 30.0},
    "all-rest": {"heads_kv": 2, "window": (512, 512), "softcap": 30.0, **REST},
    "many": {"batch": 64, "seq_q": 256},
    "many-causal-rest": {"batch": 64, "heads_kv": 2, "causal": True, "seq_q": 100},
    "many-softcap": {"batch": 64, "seq_q": 256, "causal": True, "softcap": 30.0},
}
MATRIX = {
    f"d{head_dim}-{dtype}-{feature}{'-deterministic' * deterministic}": (head_dim, dtype, feature, deterministic)
    for head_dim, dtype, feature, deterministic in product((64, 128, 256), ("bf16", "fp16"), FEATURES, (False, True))
    if head_dim < 256 or deterministic  # the only way there
}
CHOICE = [
    "d64-fp16-causal",
    "d128-bf16-gqa-causal",
    "d128-bf16-causal-deterministic",
    "d128-fp16-many-deterministic",
    "d256-bf16-causal-deterministic",
]


def problem_of(head_dim: int, dtype: str, feature: str, deterministic: bool) -> Problem:
    """The problem of one cell; one with a rest has a head_dim that is padded."""
    size = head_dim - 8 if feature.endswith("-rest") else head_dim
    fields = {"heads_kv": 4, "seq_q": 2048, **FEATURES[feature]}
    return Problem(heads_q=4, head_dim=size, dtype=dtype, pass_="bwd", **fields)


def compiled(launch: tuple) -> Build | str:
    """One kernel, or what its compiler says."""
    try:
        built = offline.build(*launch)
    except Exception as error:  # whatever a compiler of this size raises or asserts is the test's failure
        return f"does not compile: {type(error).__name__}: {str(error)[-300:]}"
    return read(built.asm["cubin"], built.metadata.shared)


def complaints(build: Build | str, kernel: str) -> list[str]:
    """What is wrong with a kernel, in words."""
    if isinstance(build, str):
        return [build]
    found = []
    if build.spills:
        found.append(f"{build.spills} bytes of local memory: registers spill")
    if build.shared > SHARED_LIMIT[90]:
        found.append(f"{build.shared} bytes of shared memory, sm_90 has {SHARED_LIMIT[90]} a block")
    if build.instructions["HGMMA"]:
        missing = [name for name in ("UTMALDG", "UTMASTG", "USETMAXREG") if not build.instructions[name]]
        found += [f"no {name}" for name in missing]
    elif kernel == "kv":
        found.append("no HGMMA")
    return found


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        names = list(MATRIX) if metafunc.config.getoption("every_kernel") else CHOICE
        metafunc.parametrize("cell", [pytest.param(MATRIX[name], id=name) for name in names])


def test_shipped(cell):
    found = [
        f"{kernel}: {what}"
        for kernel, launch in gradients.planned(problem_of(*cell), cell[3]).items()
        for what in complaints(compiled(launch), kernel)
    ]
    assert not found, "\n".join(found)


def test_the_choice_covers_the_matrix():
    """No head_dim, dtype or way to compute that only --every-kernel compiles."""
    for axis in (0, 1, 3):
        assert {MATRIX[name][axis] for name in CHOICE} == {cell[axis] for cell in MATRIX.values()}
