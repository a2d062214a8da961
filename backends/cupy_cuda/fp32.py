"""float32: FlashAttention-2 in IEEE arithmetic on FFMA (fp32_simt*) and in TF32 on mma.sync (fp32_tf32*), sm_80 and newer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash2.backends.cupy_cuda.tiles import Family, Tile, shared_limit

if TYPE_CHECKING:
    from flash2.backends.cupy_cuda.launch import Maths


def T(block_m: int, block_n: int, warps: int, stages: int = 2) -> Tile:
    """A row of the tables."""
    return Tile(block_m=block_m, block_n=block_n, warps=warps, stages=stages)


# (kernel, padded head_dim) -> tiles, of which the first that fits a device's shared memory is taken.
# Without tensor cores a warp owns 2048 / head_dim rows, and the other side's tile is head_dim long (fp32_simt.cuh).
IEEE_TILES = {
    ("forward", 64): (T(128, 64, 4, 4), T(128, 64, 4, 3)),
    ("forward", 128): (T(128, 128, 8, 4), T(64, 128, 4, 4), T(64, 128, 4, 2)),
    ("forward", 256): (T(64, 256, 8, 4), T(64, 256, 8, 2), T(32, 256, 4, 2)),
    ("gradients_kv", 64): (T(64, 128, 4), T(64, 64, 2)),
    ("gradients_kv", 128): (T(128, 128, 8), T(128, 64, 4), T(128, 32, 2)),
    ("gradients_kv", 256): (T(256, 64, 8), T(256, 32, 4), T(256, 16, 2)),
    ("gradients_q", 64): (T(128, 64, 4), T(64, 64, 2)),
    ("gradients_q", 128): (T(128, 128, 8), T(64, 128, 4), T(32, 128, 2)),
    ("gradients_q", 256): (T(64, 256, 8), T(32, 256, 4), T(16, 256, 2)),
    ("gradients", 64): (T(64, 128, 4), T(64, 64, 2)),
    ("gradients", 128): (T(128, 128, 8),),
}
# With them a warp owns 16 or 32 rows. The forward's stages are single tiles of K or V, the gradients' are pairs.
TF32_TILES = {
    ("forward", 32): (T(128, 64, 4, 4),),
    ("forward", 64): (T(128, 32, 4, 4),),
    ("forward", 128): (T(128, 32, 4),),
    ("forward", 256): (T(128, 32, 8), T(64, 32, 4), T(32, 32, 2)),
    ("gradients_kv", 32): (T(32, 128, 4),),
    ("gradients_kv", 64): (T(32, 128, 4), T(32, 64, 4)),
    ("gradients_kv", 128): (T(32, 128, 8), T(32, 64, 4), T(16, 64, 4)),
    ("gradients_kv", 256): (T(16, 64, 8), T(16, 32, 4), T(16, 16, 2)),
    ("gradients_q", 32): (T(128, 32, 4),),
    ("gradients_q", 64): (T(128, 32, 4), T(64, 32, 4)),
    ("gradients_q", 128): (T(128, 32, 8), T(64, 32, 4), T(32, 32, 2)),
    ("gradients_q", 256): (T(64, 16, 4), T(32, 16, 2), T(16, 16, 1)),
}
# With softcap or ALiBi, or a scale that is not positive: where TF32_TILES would not leave the registers that it takes.
TF32_DRESSED = {
    ("forward", 32): T(128, 32, 4, 4),
    ("gradients_kv", 32): T(32, 64, 4),
    ("gradients_q", 64): T(64, 32, 4),
    ("gradients_kv", 64): T(32, 64, 4),
}
BY_ROWS = T(32, 0, 4)  # statistics, gradients_sum
SHARES_LIMIT = 1 << 30  # bytes of dQ's shares: as much as all tensors of the default grid's problems at head_dim 64


def ieee_tile(kernel: str, maths: Maths) -> Tile:
    """The tile of an IEEE kernel for these sizes on this device."""
    return _first_that_fits(IEEE_TILES, ieee_shared, kernel, maths)


def tf32_tile(kernel: str, maths: Maths) -> Tile:
    """The tile of a TF32 kernel for these sizes on this device."""
    if not maths.fold and (kernel, maths.block_d) in TF32_DRESSED:
        return TF32_DRESSED[kernel, maths.block_d]
    return _first_that_fits(TF32_TILES, tf32_shared, kernel, maths)


def _first_that_fits(tiles, shared, kernel: str, maths: Maths) -> Tile:
    if kernel in ("statistics", "gradients_sum"):
        return BY_ROWS
    limit = shared_limit(maths.arch)
    return next(t for t in tiles[kernel, maths.block_d] if shared(kernel, t, maths.block_d) <= limit)


def ieee_parts(maths: Maths, tile: Tile | None) -> int:
    """The parts of the keys with which `gradients` is done first; 0 where two kernels, or none of its tiles, are."""
    pinned, limit = tile is not None, shared_limit(maths.arch)
    choice = [tile] if tile else IEEE_TILES.get(("gradients", maths.block_d), ())
    tile = next((t for t in choice if ieee_shared("gradients", t, maths.block_d) <= limit), None)
    if tile is None or tile.block_n % maths.block_d:
        return 0
    at_once = maths.processors * 8 // tile.warps  # blocks; all registers of a multiprocessor are 8 warps'
    tiles, heads = -(-maths.seq_kv // tile.block_n), maths.batch * maths.heads_kv
    queries, keys = maths.seq_q * maths.heads // maths.heads_kv, tiles * tile.block_n
    one = 4 * maths.batch * maths.heads * maths.rows_padded * maths.block_d  # bytes of a part's shares
    most = min(tiles, max(SHARES_LIMIT // one, 1))
    # Products x the tiles that the busiest place has one after the other, for each number of parts; of two kernels.
    times = {parts: 5 * -(-heads * parts // at_once) * -(-tiles // parts) * queries for parts in range(1, most + 1)}
    rows = -(-maths.seq_q // tile.block_n) * maths.batch * maths.heads
    apart = 4 * -(-heads * tiles // at_once) * queries + 3 * -(-rows // at_once) * keys
    best = min(times, key=times.get, default=0)
    return best if best and (pinned or times[best] <= apart) else 0


def ieee_shared(kernel: str, tile: Tile, block_d: int) -> int:
    """Bytes of dynamic shared memory: the tiles that stay and the weights, and a ring of pieces."""
    if kernel in ("statistics", "gradients_sum"):
        return 0
    rows = tile.block_n if kernel in ("gradients_kv", "gradients") else tile.block_m
    staying = 2 if kernel == "forward" else 3
    gap = 4 if block_d < 256 else 0  # between a tile's even and its odd rows
    chunk = 32 if block_d < 256 else 8 if kernel == "gradients_kv" else 16  # columns or rows in a piece: CHUNK
    return 4 * (staying * (rows * block_d + gap) + tile.stages * block_d * (chunk + 1))


def tf32_shared(kernel: str, tile: Tile, block_d: int) -> int:
    """Bytes of dynamic shared memory: the tiles that stay, and a ring of tiles or of pairs of them."""
    rows = {
        "forward": tile.block_m + tile.stages * tile.block_n,
        "statistics": 0,
        "gradients_kv": 2 * tile.block_n + tile.stages * 2 * tile.block_m,
        "gradients_q": 2 * tile.block_m + tile.stages * 2 * tile.block_n,
    }[kernel]
    return 4 * rows * (block_d + 4)


def _sources(name: str) -> dict[str, str]:
    kernels = ("forward", "gradients_kv", "gradients_q")
    return {"statistics": "fp32_statistics.cu", **{kernel: f"fp32_{name}_{kernel}.cu" for kernel in kernels}}


IEEE = Family(
    sources=_sources("simt") | {"gradients": "fp32_simt_gradients_kv.cu", "gradients_sum": "fp32_simt_gradients_sum.cu"},
    head_dims=(64, 128, 256), tile=ieee_tile, shared=ieee_shared, parts=ieee_parts,
)  # fmt: skip
TF32 = Family(sources=_sources("tf32"), head_dims=(32, 64, 128, 256), tile=tf32_tile, shared=tf32_shared)
