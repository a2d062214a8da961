"""What numba-cuda says of a machine that it cannot run on."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy
import pytest
import torch

from flash2.backends import numba_cuda


@pytest.fixture
def said(monkeypatch):
    """said(numba): what unavailable() says on a machine with a GPU and that module."""

    def look(numba):
        monkeypatch.setitem(sys.modules, "numba", numba)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(name=name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(numba_cuda, "SIMULATED", False)
        numba_cuda._lacking.cache_clear()
        try:
            return numba_cuda.NumbaCuda().unavailable()
        finally:
            numba_cuda._lacking.cache_clear()

    return look


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
def test_an_installation_that_does_not_load_is_unavailable(said, error):
    def broken(name):
        raise error

    numba = types.ModuleType("numba")
    numba.__getattr__ = broken  # from numba import cuda
    words = said(numba)
    assert "numba-cuda does not load" in words and "pip install" in words
    # `from numba import cuda` makes an ImportError of an AttributeError, with words of its own.
    assert type(error).__name__ in words or isinstance(error, AttributeError)
    assert str(error) in words or isinstance(error, AttributeError)


@pytest.mark.parametrize("line", ["import numpy; numpy.row_of_stacks", ""])
def test_a_numpy_that_fails_the_first_launch_is_seen_before_it(said, monkeypatch, tmp_path, line):
    (tmp_path / "arrayobj.py").write_text(line)
    numba, cuda, np = (types.ModuleType(name) for name in ("numba", "numba.cuda", "numba.cuda.np"))
    numba.cuda, cuda.np, np.__path__ = cuda, np, [str(tmp_path)]
    cuda.is_available = lambda: True
    monkeypatch.setitem(sys.modules, "numba.cuda", cuda)
    monkeypatch.setitem(sys.modules, "numba.cuda.np", np)
    monkeypatch.delitem(sys.modules, "numba.cuda.np.arrayobj", raising=False)
    words = said(numba)
    sys.modules.pop("numba.cuda.np.arrayobj", None)
    if not line:
        assert words is None
        return
    assert f"does not load beside NumPy {numpy.__version__} (AttributeError: " in words and "row_of_stacks" in words
    assert "\n" not in words and words.endswith("pip install -U 'flash2-triton[numba-cuda]'")
