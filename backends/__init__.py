"""The shelf: which backends there are, by name. Standard library only; nothing is imported to be listed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash2.core.contract import Backend

# name -> "module:Class", in the order `list` shows them.
BUILTIN = {
    "naive": "flash2.backends.naive:Naive",
    "sdpa": "flash2.backends.sdpa:Sdpa",
    "sdpa-flash": "flash2.backends.sdpa:SdpaFlash",
    "sdpa-cudnn": "flash2.backends.sdpa:SdpaCudnn",
    "sdpa-efficient": "flash2.backends.sdpa:SdpaEfficient",
    "sdpa-math": "flash2.backends.sdpa:SdpaMath",
    "flex": "flash2.backends.flex:Flex",
    "numba": "flash2.backends.numba_cpu:NumbaCPU",
    "triton": "flash2.backends.triton_fa2:TritonFA2",
    "gluon": "flash2.backends.gluon_hopper:GluonHopper",
    "gluon-deterministic": "flash2.backends.gluon_hopper:GluonDeterministic",
    "cupy": "flash2.backends.cupy_cuda:CupyCuda",
    "numba-cuda": "flash2.backends.numba_cuda:NumbaCuda",
    "fa2": "flash2.backends.peers.flash_attention:FA2",
    "fa3": "flash2.backends.peers.flash_attention:FA3",
    "fa4": "flash2.backends.peers.flash_attention:FA4",
    "auto": "flash2.core.auto:Auto",  # the fastest of the others that can
}
# What attention(backend=None) means on each device type.
DEFAULTS = {"cpu": "numba", "cuda": "triton"}
ENTRY_POINT_GROUP = "flash2.backends"

_registered: dict[str, str] = {}


def list_backends() -> list[str]:
    """Every name get_backend() knows: built-in, installed as an entry point, registered here."""
    return [*BUILTIN, *(name for name in {**_entry_points(), **_registered} if name not in BUILTIN)]


def get_backend(name: str) -> Backend:
    """The backend called `name`, imported on first use.

    Also takes a file, `./mine.py:Mine`. Raises ValueError with the known names for an unknown
    one, ImportError with the reason when its module cannot be imported.
    """
    target = {**_entry_points(), **BUILTIN, **_registered}.get(name)
    if target is None and ":" in name:
        target = name
    if target is None:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(list_backends())}")
    return _load(name, target)


def register_backend(name: str, target: str) -> None:
    """Add `name` for this process; `target` is "package.module:Class" or "path/to/file.py:Class".

    Raises ValueError for a name that is taken, or a target of another form.
    """
    if name in BUILTIN:
        raise ValueError(f"backend name {name!r} is taken by a built-in one; choose another")
    if not name or any(letter in name for letter in ",:/ "):
        raise ValueError(f"backend name {name!r} must be a word without comma, colon, slash or space")
    module, colon, attribute = target.rpartition(":")
    if not (module and colon and attribute.isidentifier()):
        raise ValueError(f'backend target {target!r} must be "package.module:Class" or "file.py:Class"')
    _registered[name] = target


def default_backend(device_type: str) -> str:
    """The name attention() uses on `device_type` when none is given."""
    if device_type not in DEFAULTS:
        raise ValueError(f"no default backend for device {device_type!r}; name one of {', '.join(list_backends())}")
    return DEFAULTS[device_type]


@functools.cache
def _entry_points() -> dict[str, str]:
    # Only the metadata is read; the package behind a name is imported when the name is asked for.
    return {
        point.name: point.value
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        if point.name not in BUILTIN
    }


@functools.cache
def _load(name: str, target: str) -> Backend:
    module_name, _, attribute = target.rpartition(":")
    try:
        module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        backend = getattr(module, attribute)()
    except Exception as error:  # whatever a plug-in's import raises, the user wants to read which and why
        raise ImportError(f"backend {name!r} ({target}) cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := [part for part in ("name", "capability", "why_not", "forward") if not hasattr(backend, part)]:
        raise ImportError(f"backend {name!r} ({target}) is no flash2 Backend: it lacks {', '.join(missing)}")
    return backend


def _import_file(path: str):
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"flash2_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, path  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up here
    spec.loader.exec_module(module)
    return module
