"""The Triton backend's own tests: by Triton's interpreter on the CPU, or on a GPU with --device cuda.

The interpreter is chosen when Triton is imported, so these tests run in a process that was started with
TRITON_INTERPRET=1; tests/unit/test_triton_interpreter.py starts one. Without either they are not collected.
"""

from __future__ import annotations

import os

import pytest
import torch
from judged import Case

from flash2 import get_backend

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    """Nothing here can run on a CPU without the interpreter."""
    return True if not INTERPRET and torch.device(config.getoption("device")).type != "cuda" else None


@pytest.fixture
def device(request) -> torch.device:
    """Where the kernels run."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def case(device):
    """precision -> a Case of the Triton backend."""
    backend = get_backend("triton")
    if (reason := backend.unavailable()) is not None:
        pytest.skip(reason)
    return lambda precision: Case(backend, precision, device)


@pytest.fixture(autouse=True)
def poison(device):
    """What torch.empty hands out holds NaN, so that an element nobody writes shows."""
    if device.type == "cuda":  # its libraries have a switch of their own
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan(), "torch no longer fills empty tensors where it must be deterministic"
    yield
    torch.use_deterministic_algorithms(False)
