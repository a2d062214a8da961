"""Launching a compiled Triton or Gluon kernel without Triton's Python around its C launcher, which costs more than the launch.

Triton's own way copies every argument in Python, encodes each tensor descriptor anew and calls two empty hooks. Here the
encoded descriptors are kept by address, everything but the tensors is put together once, and pointers go in as numbers.
The C launcher's signature is Triton 3.6's, which torch 2.11 pins; with any other version runner() answers None.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

KEPT = 64  # encoded descriptors an argument; an address comes back when torch reuses its memory


class Encoded:
    """A tensor argument that goes in as a descriptor: what the launcher takes for it, by address."""

    __slots__ = ("encode", "kept")

    def __init__(self, encode: Callable[[torch.Tensor], list]) -> None:
        self.encode = encode
        self.kept: dict[int, list] = {}

    def __call__(self, x: torch.Tensor) -> list:
        address = x.data_ptr()
        found = self.kept.get(address)
        if found is None:
            if len(self.kept) >= KEPT:
                self.kept.clear()
            found = self.kept[address] = self.encode(x)
        return found


def hollow(desc: Any) -> Any:
    """`desc` without its tensor: a plan that lives on would keep that in memory, and out of reach of CUDA graphs' pools."""
    desc.base = None
    return desc


def runner(
    compiled: Any, grid: tuple[int, int, int], device: int, shells: tuple, moved, tail: tuple
) -> Callable | None:
    """f(tensors), which launches `compiled` on `device`'s current stream, or None where Triton has to do that.

    shells: for each tensor a hollow TensorDescriptor of its layout, or None for a pointer; () for pointers alone.
    moved(shell, x): the descriptor for a tensor of that layout. tail: the arguments after the tensors.
    """
    import triton as _triton

    triton: Any = _triton  # much of it exists when it is first read
    if not triton.__version__.startswith("3.6.") or not isinstance(compiled, triton.compiler.CompiledKernel):
        return None
    launcher, hooks = compiled.run, triton.knobs.runtime
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    launch = launcher.launch
    if isinstance(launch, FunctionType):  # Triton's loop over the arguments, around the C launcher
        names, cells = launch.__code__.co_freevars, launch.__closure__ or ()
        launch = cells[names.index("launcher")].cell_contents
    metas = iter(compiled.metadata.tensordesc_meta or [None] * len(shells))
    encoders = tuple(None if shell is None else Encoded(encoder(shell, next(metas), moved)) for shell in shells)
    head = *grid, triton.runtime.driver.active.get_current_stream
    before = (
        compiled.function,
        launcher.launch_cooperative_grid,
        launcher.launch_pdl,
        None,
        None,
        compiled.packed_metadata,
    )
    theirs = compiled[grid]

    def run(tensors: tuple) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler wants to know
            theirs(
                *(moved(s, x) if s else x for s, x in zip(shells, tensors, strict=True)) if shells else tensors, *tail
            )
            return
        places = []
        if encoders:
            for encode, x in zip(encoders, tensors, strict=True):
                if encode is not None:
                    places += encode(x)
                else:
                    places.append(None if x is None else x.data_ptr())
        else:
            places = [None if x is None else x.data_ptr() for x in tensors]
        x, y, z, stream = head
        launch(x, y, z, stream(device), *before, None, None, None, *places, *tail)

    return run


def encoder(shell, meta: dict | None, moved) -> Callable[[torch.Tensor], list]:
    """x -> the launcher's arguments for a tensor of the layout that `shell` describes."""
    from triton.backends.nvidia import driver

    encode: Any = driver.make_tensordesc_arg  # of Triton 3.6
    return lambda x: encode(moved(shell, x), meta)
