"""What a class of maths brings along: its sources, its tiles, and the shared memory they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash2.backends.cupy_cuda.launch import Maths

# Bytes of shared memory one block may use (CUDA C programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}


def shared_limit(arch: int) -> int:
    """SHARED_LIMIT of compute capability `arch` (90 for 9.0); what every device since 8.0 has, for one not known."""
    return SHARED_LIMIT.get(arch, 101_376)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """block_m query rows by block_n keys, the warps of a block, and how many tiles of a loop are in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 2

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} w{self.warps} s{self.stages}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The kernels forward, statistics, gradients_kv and gradients_q of one or more classes of maths; `gradients` and
    gradients_sum where there are kernels with both sides' gradients at once.

    sources: kernel -> its file here. head_dims: what head_dim is padded to, ascending. tile(kernel, maths): the tile
    for a problem on maths.arch. shared(kernel, tile, block_d): bytes of dynamic shared memory, the SHARED of a source.
    parts(maths, tile): into how many parts `gradients` divides a head's keys, in that tile or None for the table's; 0 for
    two kernels.
    """

    sources: dict[str, str]
    head_dims: tuple[int, ...]
    tile: Callable[[str, Maths], Tile]
    shared: Callable[[str, Tile, int], int]
    parts: Callable[[Maths, Tile | None], int] = lambda maths, tile: 0
