"""Every shipped Gluon kernel for sm_90 by the Triton that runs this test: it builds, and no register spills.

`make gluon-versions` runs it with each Triton that is supported; other runs have a choice (--every-kernel: all).
"""

from __future__ import annotations

from itertools import product

import pytest

triton = pytest.importorskip("triton")

from flash2.backends.gluon_hopper import gradients, offline  # noqa: E402
from flash2.backends.triton_fa2.offline import SHARED_LIMIT, Build, read  # noqa: E402
from flash2.core.problem import Problem  # noqa: E402

# Lengths at which the forward's configuration changes, one of each kind of mask.
FORWARD = {
    f"fwd-d{head_dim}-{mask}-{seq}": (head_dim, mask, seq)
    for head_dim, mask, seq in product((64, 128, 256), ("full", "causal"), (512, 2048))
    if head_dim < 256 or seq == 512
}
BACKWARD = {
    f"{kernel}-d{head_dim}-{mask}{'-deterministic' * deterministic}": (head_dim, mask, deterministic, kernel)
    for head_dim, mask, deterministic, kernel in product(
        (64, 128, 256),
        ("full", "causal", "groups-full", "groups-causal"),
        (False, True),
        ("maxima", "statistics", "kv", "q"),
    )
    if (deterministic or head_dim < 256)  # the only way there
    and (kernel != "maxima" or (deterministic and head_dim < 256))
    and (kernel == "kv" or not mask.startswith("groups"))  # which is another kernel
}
CELLS = FORWARD | BACKWARD
CHOICE = [
    "fwd-d64-full-2048",
    "fwd-d128-causal-512",
    "kv-d128-causal",
    "kv-d128-groups-causal",
    "q-d256-full-deterministic",
]


def built(name: str) -> Build | str:
    """One kernel, or what its compiler says."""
    head_dim, mask, *rest = CELLS[name]
    problem = Problem(
        batch=2, heads_q=4, heads_kv=2 if mask.startswith("groups") else 4, seq_q=2048, head_dim=head_dim, dtype="bf16",
        causal=mask.endswith("causal"),
    )  # fmt: skip
    try:
        if name in FORWARD:
            launch = offline.planned(problem.replace(seq_q=rest[0], seq_kv=rest[0]))
        else:
            deterministic, kernel = rest
            launch = gradients.planned(problem.replace(pass_="bwd"), deterministic)[kernel]
        kernel = offline.build(*launch)
    except Exception as error:  # whatever a compiler of this size raises or asserts is the test's failure
        while error.__cause__ is not None:
            error = error.__cause__
        return f"does not compile: {type(error).__name__}: {str(error)[-300:]}"
    return read(kernel.asm["cubin"], kernel.metadata.shared, sass=False)


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", list(CELLS) if metafunc.config.getoption("every_kernel") else CHOICE)


def test_it_builds_without_spills(cell):
    build = built(cell)
    assert isinstance(build, Build), build
    assert not build.spills, f"{build.registers} registers, {build.spills} bytes spilled"
    assert build.shared <= SHARED_LIMIT[90]
