"""The order of unequal row tiles: every tile once, balanced."""

from __future__ import annotations

import itertools

import pytest

from flash2.backends.gluon_hopper.schedule import ROW_BITS, plan

WORK = [1.9, 2.9, 3.9, 4.9]


def blocks_of(*arguments) -> list[list[int]]:
    """What each block does, in order."""
    blocks = arguments[2]
    table, rounds = plan(*arguments)
    counts = table[rounds * blocks :]
    return [[table[r * blocks + block] for r in range(counts[block])] for block in range(blocks)]


@pytest.mark.parametrize(("rows", "blocks", "together"), [(128, 132, 128), (64, 7, 16), (3, 12, 1), (1, 3, 1)])
def test_every_tile_once(rows, blocks, together):
    tiles = [tile for mine in blocks_of(WORK, rows, blocks, together) for tile in mine]
    assert sorted(tiles) == sorted(row << ROW_BITS | m for row in range(rows) for m in range(len(WORK)))


def loads(mine: list[list[int]]) -> list[float]:
    return [sum(WORK[tile & ((1 << ROW_BITS) - 1)] for tile in tiles) for tiles in mine]


def test_blocks_have_as_much_to_do():
    work = loads(blocks_of(WORK, 1024, 132, 128))
    assert max(work) < 1.01 * sum(work) / len(work)


def test_groups_are_of_about_one_size():
    """64 heads, ten at a time at most: not six groups of ten and then one of four, whose longest tile all wait for."""
    tiles = [tile >> ROW_BITS for mine in blocks_of(WORK, 64, 1, 10) for tile in mine]
    sizes = [len(set(tiles[i * 4 : j * 4])) for i, j in itertools.pairwise(64 * k // 7 for k in range(8))]
    assert sizes == [9, 9, 9, 9, 9, 9, 10]
