"""fp16 and bf16, forward, on compute capability 9.0: wgmma, TMA, a producer warp (half_hopper_forward.cu)."""

from __future__ import annotations

import ctypes
import functools
import heapq
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flash2.backends.cupy_cuda.tiles import shared_limit

if TYPE_CHECKING:
    from flash2.backends.cupy_cuda.launch import Maths

SOURCE = "half_hopper_forward.cu"
PROCESSORS = 132  # multiprocessors of an H100 or H200
# struct Hopper: the maps of q, k and v, Params, then this, up to a multiple of 64 bytes.
MAP = 128
HEAD = 3 * MAP
TAIL = struct.Struct("Q2i16x")
FLAGS = ("turns", "ordered", "qreg")
L2_SHARE = 16 << 20  # bytes of K and V that stay in the L2 cache beside all else


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperTile:
    """block_m query rows, 64 a warpgroup, by block_n keys; stages of the rings of K and V, and q_slots of Q.

    turns: the warpgroups alternate at the tensor cores. ordered: the wait for P V stays behind the exponentials.
    qreg: Q is a register operand.
    """

    block_m: int
    block_n: int
    stages: int = 2
    q_slots: int = 2
    turns: bool = False
    ordered: bool = False
    qreg: bool = False

    @property
    def warps(self) -> int:
        """Of a block: the producer's warpgroup, of which one warp works, and the others'."""
        return 4 * (self.block_m // 64 + 1)

    def __str__(self) -> str:
        flags = "".join(f" {flag}" for flag in FLAGS if getattr(self, flag))
        return f"wgmma {self.block_m}x{self.block_n} s{self.stages} q{self.q_slots}{flags}"


def parse(text: str) -> HopperTile | None:
    """'wgmma 128x128 s2 q2 turns ordered' as a HopperTile; None for another form."""
    match = re.fullmatch(rf"wgmma (128|192)x(64|128) s(\d) q(\d)((?: (?:{'|'.join(FLAGS)}))*)", text.strip())
    if match is None:
        return None
    block_m, block_n, stages, q_slots = map(int, match.groups()[:4])
    flags = dict.fromkeys(match[5].split(), True)
    return HopperTile(block_m=block_m, block_n=block_n, stages=stages, q_slots=q_slots, **flags)


def suits(maths: Maths) -> bool:
    """Is the kernel made for such a problem? (What TMA cannot read, `describable` says.)"""
    return (
        maths.arch == 90 and maths.precision in ("fp16", "bf16") and maths.fold
        and 32 < maths.head_dim <= 128 and maths.head_dim % 8 == 0
    )  # fmt: skip


def block_d(maths: Maths) -> int:
    """head_dim as the kernel computes it; TMA fills the rest with zeros."""
    return 64 if maths.head_dim <= 64 else 128


def tile(maths: Maths) -> HopperTile:
    """The tile for these sizes."""
    if block_d(maths) == 128:
        if maths.banded:
            return HopperTile(block_m=128, block_n=128, q_slots=1, turns=True, ordered=True, qreg=True)
        return HopperTile(block_m=128, block_n=128, turns=True, ordered=True, qreg=True)
    if maths.seq_q <= 128 or (maths.banded and maths.seq_kv < 1024):
        return HopperTile(block_m=128, block_n=128, stages=3, turns=True, ordered=True)
    return HopperTile(block_m=192, block_n=128, turns=True)


def shared(tile: HopperTile, width: int) -> int:
    """Bytes of dynamic shared memory: the rings, and a barrier for every slot."""
    slots = 2 * tile.stages * tile.block_n + tile.q_slots * tile.block_m
    return 2 * width * slots + 8 * (2 * tile.stages + tile.q_slots)


def defines(tile: HopperTile, maths: Maths) -> dict[str, int]:
    """What the source is compiled for, but for PRECISION. ValueError if the device has too little shared memory."""
    size = shared(tile, block_d(maths))
    if size > shared_limit(maths.arch):
        raise ValueError(f"tile {tile} takes {size} bytes of shared memory, a block has {shared_limit(maths.arch)}")
    return {
        "BLOCK_D": block_d(maths), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages,
        "Q_SLOTS": tile.q_slots, "TURNS": int(tile.turns), "ORDERED": int(tile.ordered),
        "Q_REGISTERS": int(tile.qreg), "WARPS": tile.warps, "SHARED": size,
    }  # fmt: skip


# ---- tensor maps


def describable(x: torch.Tensor) -> bool:
    """Can a tensor map describe x, whose rows are dense? Address and strides in steps of 16 bytes, none of them 0."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(0 < s < 1 << 38 and s % 8 == 0 for s in strides)


def encode(address: int, x: torch.Tensor, rows: int) -> None:
    """Write at `address`, a multiple of 64, the map of x (batch, heads, seq, head_dim) in boxes of rows by 64 columns.

    RuntimeError with the driver's code.
    """
    batch, heads, seq, head_dim = x.shape
    # The stride of an axis of length 1 is never taken, but must fit all the same.
    strides = [2 * s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), 6 if x.dtype == torch.float16 else 9, 4, ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * 4)(head_dim, seq, heads, batch), (ctypes.c_uint64 * 3)(*reversed(strides)),
        (ctypes.c_uint32 * 4)(64, rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        0, 3, 3, 0,  # no interleave, 128-byte swizzle, L2 promotion to 256 bytes, zeros out of bounds
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {status} for shape {tuple(x.shape)}, strides {x.stride()}")


def mover():
    """move(map, address): the driver's cuTensorMapReplaceAddress, which returns 0 if all is well."""
    return _driver().cuTensorMapReplaceAddress


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


# ---- the order of the row tiles


def key_tiles(maths: Maths, tile: HopperTile) -> list[int]:
    """How many key tiles each row tile of a head sees: keys_of of problem.cuh."""
    offset, found = maths.seq_kv - maths.seq_q, []
    for start in range(0, maths.seq_q, tile.block_m):
        first, last = start + offset, min(start + tile.block_m, maths.seq_q) - 1 + offset
        lo = max(first - maths.left, 0) // tile.block_n * tile.block_n
        hi = min(maths.seq_kv, max(last + maths.right + 1, 0))
        found.append(-(-(hi - lo) // tile.block_n) if hi > lo else 0)
    return found


def order(maths: Maths, tile: HopperTile, blocks: int) -> tuple[int, list[int]]:
    """(rounds, table): table[round * blocks + block] is the row tile that a block computes in a round, or -1.

    Tiles of heads whose K and V fit the L2 cache together come together, the longest first, each to the block that has
    least to do so far. An empty table: one after the other would do as well.
    """
    lengths = key_tiles(maths, tile)
    heads, row_tiles = maths.batch * maths.heads, len(lengths)
    if heads * row_tiles <= blocks or min(lengths) == max(lengths):
        return 0, []
    group = maths.heads // maths.heads_kv
    together = group * max(1, L2_SHARE // (4 * maths.seq_kv * maths.head_dim))
    longest_first = sorted(range(row_tiles), key=lambda m: -lengths[m])
    queues: list[list[int]] = [[] for _ in range(blocks)]
    load = [(0, block) for block in range(blocks)]
    for section in range(0, heads, together):
        for m in longest_first:
            cost = lengths[m] + 1  # what begins and ends a tile takes about as long as a key tile
            for head in range(section, min(section + together, heads)):
                done, block = load[0]
                heapq.heapreplace(load, (done + cost, block))
                queues[block].append(head * row_tiles + m)
    rounds = max(map(len, queues))
    return rounds, [queue[r] if r < len(queue) else -1 for r in range(rounds) for queue in queues]
