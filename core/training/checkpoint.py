"""Checkpoints that a full disk, a kill or a crash cannot spoil: written beside the old one, then put in its place."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


class CheckpointError(Exception):
    """It cannot be saved or read; the text says which file and why."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, whole or not at all.

    Raises CheckpointError; what was at `path` before is then still there.
    """
    # Serialised in memory first: torch's own writer turns a full disk into an error without a name.
    data = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, data)
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        kept = f"; the one of before is still in {path}" if path.is_file() else ""
        raise CheckpointError(f"no checkpoint could be written to {path}: {error.strerror or error}{kept}") from error


def load(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The state saved at `path`, on the CPU, read without running code. `model`: the shape that its weights must have.

    Raises CheckpointError for a file that is none, or of another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint: {(str(error) or 'cut short').splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no checkpoint of this version")
    if state["shape"] != model:
        differing = [
            f"{name} {state['shape'].get(name)}, not {value}"
            for name, value in model.items()
            if state["shape"].get(name) != value
        ]
        raise CheckpointError(f"{path} is of another model: {', '.join(differing)}")
    return state
