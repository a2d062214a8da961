"""The numba-cuda backend's own tests, by numba's CUDA simulator on the CPU.

The simulator is chosen when numba is imported, so these tests run in a process that was started with
NUMBA_ENABLE_CUDASIM=1; tests/unit/test_numba_simulator.py starts one. Elsewhere they are not collected.
"""

from __future__ import annotations

import os

import pytest
import torch
from judged import Case

from flash2.backends.numba_cuda import NumbaCuda


def pytest_ignore_collect(collection_path, config):
    """Nothing here can run without the simulator."""
    return True if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1" else None


@pytest.fixture
def case() -> Case:
    """The backend in its one class of maths."""
    return Case(NumbaCuda(), "ieee", torch.device("cpu"))


@pytest.fixture(autouse=True)
def poison(one_thread):
    """What torch.empty hands out holds NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan(), "torch no longer fills empty tensors where it must be deterministic"
    yield
    torch.use_deterministic_algorithms(False)
