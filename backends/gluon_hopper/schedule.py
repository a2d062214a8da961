"""The order in which blocks compute row tiles of unequal length, planned on the host. No torch, no Triton."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

ROW_BITS = 12  # of an entry; the rest is batch * heads + head
LIMIT = 1 << 16  # row tiles; planning takes the host a microsecond each
# K and V of heads that are computed at the same time: what stays in the L2 cache (50 MB) beside everything else.
L2_SHARE = 16 << 20


def fits(row_tiles: int, rows: int) -> bool:
    """Can an entry of plan() hold these, and is the planning quick?"""
    return row_tiles <= 1 << ROW_BITS and rows < 1 << (31 - ROW_BITS) and row_tiles * rows <= LIMIT


def plan(work: Sequence[float], rows: int, blocks: int, together: int) -> tuple[list[int], int]:
    """(table, rounds) for `blocks` blocks and the row tiles of `rows` heads, where work[m] is what row tile m costs.

    table[round * blocks + block] is head << ROW_BITS | m, and after the rounds each block's number of them. Groups of up
    to `together` heads, all of about one size, follow one another, so that what their tiles share is read from device
    memory once; in a group the longest tile goes first, to the block that has the least to do (Graham's rule: at most
    4/3 of the best, here within 1 %).
    """
    loads = [(0.0, block) for block in range(blocks)]
    mine: list[list[int]] = [[] for _ in range(blocks)]
    longest = sorted(range(len(work)), key=lambda m: -work[m])
    groups = -(-rows // together)
    for group in range(groups):
        heads = range(rows * group // groups, rows * (group + 1) // groups)
        for m in longest:
            for row in heads:
                load, block = loads[0]
                mine[block].append(row << ROW_BITS | m)
                heapq.heapreplace(loads, (load + work[m], block))
    rounds = max(map(len, mine))
    table = [tiles[r] if r < len(tiles) else 0 for r in range(rounds) for tiles in mine]
    return table + [len(tiles) for tiles in mine], rounds
