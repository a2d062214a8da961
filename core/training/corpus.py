"""Real text that every machine has: the source code of Python's standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# Not the library itself: what was installed into it, and its tests, more than half of the bytes and mostly tables of data.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SEPARATOR = b"\0"  # between files; a sample begins with it
VALIDATION_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Corpus:
    """train and validation: uint8 (bytes,), each its files in order of their path. files: how many of each."""

    train: torch.Tensor
    validation: torch.Tensor
    files: tuple[int, int]


@cache
def standard_library(root: str | None = None) -> Corpus:
    """Every .py file under `root` (default: the running Python's library), a file wholly in one part or the other.

    The part is a hash of the path, so that it is the same on every machine. Raises FileNotFoundError if there is none.
    """
    top = Path(root or sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(top.rglob("*.py"), key=lambda path: path.relative_to(top).parts):
        name = path.relative_to(top)
        if not LEFT_OUT & set(name.parts):
            parts[held_out(name.as_posix())].append(path.read_bytes())
    if not all(parts):
        raise FileNotFoundError(
            f"{top} holds no source code to train on; this Python came without its library's source"
        )
    train, validation = (
        torch.frombuffer(bytearray(SEPARATOR + SEPARATOR.join(files)), dtype=torch.uint8) for files in parts
    )
    return Corpus(train, validation, (len(parts[0]), len(parts[1])))


def held_out(name: str) -> bool:
    """Does the file of this relative path belong to the validation part?"""
    return hashlib.sha256(name.encode()).digest()[0] < 256 * VALIDATION_SHARE


def batch(text: torch.Tensor, count: int, length: int, seed: int, step: int) -> torch.Tensor:
    """(count, length) int64: windows of `text` at places that depend on seed and step alone, whatever the device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator)
    return windows(text, starts, length)


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """(len(starts), length) int64 on text's device."""
    if text.is_cuda:  # a copy from memory that is not pinned would wait for all that the device still has to do
        starts = starts.pin_memory()
    places = starts.to(text.device, non_blocking=True)[:, None] + torch.arange(length, device=text.device)
    return text[places].long()


def validation_windows(text: torch.Tensor, tokens: int, context: int) -> torch.Tensor:
    """(windows, context + 1) int64: evenly spread over `text`, about `tokens` predictions in all, at least one window."""
    most = (len(text) - 1) // context
    count = max(1, min(tokens // context, most))
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    return windows(text, starts, context + 1)
