"""What each built-in backend declares: the table of docs/contract.md, and of docs/kernels-in-python.md what it does not.

`python tests/feature_table.py` rewrites both.
"""

from __future__ import annotations

from pathlib import Path

import torch

import flash2
from flash2 import get_backend
from flash2.backends import BUILTIN
from flash2.core.contract import FEATURES, Backend, Capability
from flash2.core.problem import PRECISIONS
from flash2.core.ways import WAYS

DOCS = Path(flash2.__file__).parent / "docs"
CONTRACT, COMPARISON = DOCS / "contract.md", DOCS / "kernels-in-python.md"
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


def gaps() -> str:
    """One row per way to write a kernel: what its backend does not declare."""
    lines = [["way", "cannot"], ["---", "---"]]
    lines += [[way.title, "; ".join(lacking(get_backend(way.backend).capability))] for way in WAYS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lacking(capability: Capability) -> list[str]:
    """Everything that `capability` leaves out, in words."""
    found = [f"no {name}" for device, name in (("cpu", "CPU"), ("cuda", "GPU")) if device not in capability.devices]
    if capability.min_arch is not None:
        newest = capability.max_arch
        sm = "sm_{}{}".format(*capability.min_arch)
        found.append(f"only {sm}" if newest == capability.min_arch else f"nothing before {sm}")
        if newest not in (None, capability.min_arch):
            found.append("nothing after sm_{}{}".format(*newest))
    for dtype, classes in PRECISIONS.items():
        offered = capability.precisions.get(dtype, ())
        if not offered:
            found.append(f"no {dtype}")
        elif missing := [name for name in classes if name not in offered]:
            found.append(f"no {dtype} in {', '.join(missing)}")
    found += [f"no {name}" for name in FEATURES if name not in capability.features]
    dims = capability.head_dims
    if dims[-1] <= 512:
        found.append(f"no head_dim above {dims[-1]}")
    if dims[0] > 1 or (isinstance(dims, range) and dims.step > 1):
        found.append(f"head_dim from {dims[0]} on in steps of {dims.step if isinstance(dims, range) else 'its own'}")
    found += [] if capability.backward else ["no backward"]
    return found + ([] if capability.deterministic else ["not the same bits every time"])


TABLES = {CONTRACT: table, COMPARISON: gaps}


def written(document: str, made: str) -> str:
    """`document` with `made` between its markers."""
    before, found, rest = document.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the document lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


if __name__ == "__main__":
    for path, make in TABLES.items():
        path.write_text(written(path.read_text(), make()))
