"""The shelf: names, plug-ins from modules, files and entry points, and what it says when they break."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flash2
from flash2 import backends, get_backend, list_backends, register_backend

MINE = """
from flash2.core.contract import Backend, Capability

class Mine(Backend):
    name = "mine"
    capability = Capability(devices=("cpu",), precisions={"fp32": ("ieee",)})

    def forward(self, q, k, v, spec):
        return q, None
"""


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    backends._load.cache_clear()


def test_the_built_in_names():
    names = list_backends()
    assert names[: len(backends.BUILTIN)] == list(backends.BUILTIN)
    assert {"naive", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex", "numba"} <= set(names)
    assert {"triton", "gluon", "cupy"} <= set(names)


@pytest.mark.parametrize("name", list(backends.BUILTIN))
def test_every_built_in_loads_under_its_name_once(name):
    backend = get_backend(name)
    assert backend.name == name
    assert get_backend(name) is backend
    assert backend.unavailable() is None or isinstance(backend.unavailable(), str)


@pytest.mark.parametrize("name", ["nave", "", "triton3", "flash2"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as caught:
        get_backend(name)
    assert repr(name) in str(caught.value)
    assert ", ".join(list_backends()) in str(caught.value)


def test_a_backend_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    assert get_backend(f"{path}:Mine").name == "mine"


def test_a_registered_backend(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    register_backend("mine", f"{path}:Mine")
    assert list_backends()[-1] == "mine"
    assert get_backend("mine").name == "mine"


@pytest.mark.parametrize("name", ["naive", "sdpa", "a,b", "a:b", "a/b", "a b", ""])
def test_a_name_that_cannot_be_registered(name):
    with pytest.raises(ValueError, match="backend name"):
        register_backend(name, "some.module:Class")


@pytest.mark.parametrize("target", ["some.module", ":Class", "some.module:", "some.module:not a name"])
def test_a_target_that_cannot_be_registered(target):
    with pytest.raises(ValueError, match="must be"):
        register_backend("mine", target)
    assert "mine" not in list_backends()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("x = (", "SyntaxError"),
        ("", "has no attribute 'Mine'"),
        ("class Mine: pass", "is no flash2 Backend: it lacks name, capability, why_not, forward"),
        (MINE.replace('"ieee"', '"fast"'), "is not drawn from"),
    ],
)
def test_a_broken_plugin_is_an_import_error_with_its_cause(tmp_path, source, says):
    path = tmp_path / "mine.py"
    path.write_text(source)
    register_backend("mine", f"{path}:Mine")
    assert "mine" in list_backends()
    with pytest.raises(ImportError) as caught:
        get_backend("mine")
    assert says in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ImportError, match="no file"):
        get_backend(f"{tmp_path}/absent.py:Mine")


def test_entry_points_are_listed_without_importing(tmp_path):
    """An installed package's backend is known by its metadata; its code runs when it is asked for, not before."""
    (tmp_path / "fast_attention.py").write_text("print('IMPORTED')\n" + MINE)
    (tmp_path / "broken_attention.py").write_text("raise OSError('libfast.so not found')")
    metadata = tmp_path / "fast_attention-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-attention\nVersion: 1.0\n")
    points = "fast = fast_attention:Mine\nbroken = broken_attention:Mine\nnaive = fast_attention:Mine\ntriton = x:Y\n"
    (metadata / "entry_points.txt").write_text(f"[flash2.backends]\n{points}")
    script = """
import sys
from flash2 import get_backend, list_backends
names = list_backends()
assert names[-2:] == ["fast", "broken"], names
assert names.count("naive") == 1 and names.count("triton") <= 1, names
print("listed", "fast_attention" in sys.modules, "torch" in sys.modules)
print(get_backend("fast").name, type(get_backend("naive")).__name__)
try:
    get_backend("broken")
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        cwd=Path(flash2.__file__).parent,
    )
    assert done.stdout.splitlines() == [
        "listed False False",
        "IMPORTED",
        "mine Naive",
        "backend 'broken' (broken_attention:Mine) cannot be loaded: OSError: libfast.so not found",
    ]
