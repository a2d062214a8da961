"""What numba-cuda says of a machine that it cannot run on."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from flash2.backends import numba_cuda


@pytest.mark.parametrize(
    "error",
    [
        ImportError("too old"),
        AttributeError("no row_stack"),
        TypeError("'NoneType' is not iterable"),
        RuntimeError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_installation_that_does_not_load_is_unavailable(monkeypatch, error):
    def broken(name):
        raise error

    numba = types.ModuleType("numba")
    numba.__getattr__ = broken  # from numba import cuda
    monkeypatch.setitem(sys.modules, "numba", numba)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(numba_cuda, "SIMULATED", False)
    numba_cuda._lacking.cache_clear()
    try:
        said = numba_cuda.NumbaCuda().unavailable()
    finally:
        numba_cuda._lacking.cache_clear()
    assert "numba-cuda does not load" in said and "pip install" in said
    # `from numba import cuda` makes an ImportError of an AttributeError, with words of its own.
    assert type(error).__name__ in said or isinstance(error, AttributeError)
    assert str(error) in said or isinstance(error, AttributeError)
