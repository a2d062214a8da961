"""The table of docs/contract.md: what each built-in backend declares. `python tests/feature_table.py` rewrites it."""

from __future__ import annotations

from pathlib import Path

import torch

import flash2
from flash2 import get_backend
from flash2.backends import BUILTIN
from flash2.core.contract import FEATURES, Backend, Capability

DOCUMENT = Path(flash2.__file__).parent / "docs" / "contract.md"
BEGIN, END = "<!-- declared: begin -->", "<!-- declared: end -->"


def table() -> str:
    """One row per backend and device, read from the capabilities; needs no device."""
    columns = ["backend", "device", "classes of maths", "head_dim", *FEATURES, "backward", "deterministic"]
    lines = [columns, ["---"] * len(columns)]
    for name in BUILTIN:
        backend = get_backend(name)
        for device in backend.capability.devices:
            lines.append(row(backend, device, backend.capability_on(torch.device(device))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(backend: Backend, device: str, capability: Capability) -> list[str]:
    """The cells of one backend on one device."""
    classes = ", ".join(
        dtype if offered == (dtype,) else f"{dtype}: {'/'.join(offered)}"
        for dtype, offered in capability.precisions.items()
    )
    dims = capability.head_dims
    if isinstance(dims, range):
        shown = f"{dims.start}-{dims[-1]}" if dims[-1] <= 512 else f"{dims.start}-"
        shown += f" by {dims.step}" if dims.step != 1 else ""
    else:
        shown = ", ".join(map(str, dims))
    flags = [feature in capability.features for feature in FEATURES] + [capability.backward, capability.deterministic]
    return [f"`{backend.name}`", device, classes, shown, *("yes" if flag else "-" for flag in flags)]


def written(document: str) -> str:
    """`document` with the table between its markers made anew."""
    before, found, rest = document.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the document lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
