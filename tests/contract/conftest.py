"""Every test of the contract runs on every backend of the registry; a backend joins by being registered."""

from __future__ import annotations

import pytest
import torch
from judged import Case

from flash2 import get_backend, list_backends


def pytest_generate_tests(metafunc):
    """`case` is a backend in one class of maths, `backend` its name alone, in the class it prefers."""
    if "case" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("device"))
        cells = [(name, precision) for name in names(metafunc.config) for precision in classes(name, device)]
        metafunc.parametrize("case", cells, ids=[f"{name}-{precision}" for name, precision in cells], indirect=True)
    elif "any_case" in metafunc.fixturenames:
        chosen = names(metafunc.config)
        metafunc.parametrize("any_case", chosen, ids=chosen, indirect=True)


def names(config) -> list[str]:
    """The backends under test; "auto", which is always one of the others, when it is asked for."""
    asked = config.getoption("backends")
    return asked.split(",") if asked else [name for name in list_backends() if name != "auto"]


def classes(name: str, device: torch.device) -> list[str]:
    """The classes of maths a backend declares on `device`; one that has none there gets one test, which skips."""
    try:
        backend = get_backend(name)
    except ImportError:
        return ["?"]  # its test fails with the reason
    offered = [c for dtype in backend.capability.precisions for c in backend.classes(dtype, device)]
    return offered if offered and device.type in backend.capability_on(device).devices else ["?"]


@pytest.fixture
def case(request):
    """A Case: (backend, class of maths, device), or a skip that says why not here."""
    name, precision = request.param
    yield from _case(request, name, precision)


@pytest.fixture
def any_case(request):
    """A Case in the class that suits best: fp32's first, else the backend's own first."""
    device = torch.device(request.config.getoption("device"))
    offered = classes(request.param, device)
    preferred = [c for c in ("ieee", "tf32x3", "fp64") if c in offered]
    yield from _case(request, request.param, (preferred or offered)[0])


def _case(request, name: str, precision: str):
    device = torch.device(request.config.getoption("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch sees no CUDA device", returncode=4)
    backend = get_backend(name)
    if (reason := backend.unavailable()) is not None:
        pytest.skip(f"{name} is unavailable: {reason}")
    if device.type not in backend.capability_on(device).devices:
        pytest.skip(f"{name} does not run on {device.type}")
    selected = request.node.get_closest_marker("few_shapes") or request.config.getoption("every_shape")
    if backend.compiles_per_shape and not selected:
        pytest.skip(f"{name} compiles every shape for seconds; --every-shape runs this too")
    case = Case(backend, precision, device)
    if device.type != "cuda":
        yield case
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    yield case
    torch.backends.cuda.matmul.allow_tf32 = before
