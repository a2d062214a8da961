"""fp16 and bf16: FlashAttention-2 on mma.sync tensor cores (half_*.cu), sm_80 and newer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash2.backends.cupy_cuda.tiles import Family, Tile, shared_limit

if TYPE_CHECKING:
    from flash2.backends.cupy_cuda.launch import Maths


def T(block_m: int, block_n: int, warps: int, stages: int = 2) -> Tile:
    """A row of the tables."""
    return Tile(block_m=block_m, block_n=block_n, warps=warps, stages=stages)


# (kernel, padded head_dim) -> tiles, of which the first that fits a device's shared memory is taken. What bounds a tile
# otherwise is 255 registers a thread: a warp of the forward holds block_m/warps rows of o and of s, one of gradients_kv
# block_n/warps rows of dk and dv, one of gradients_q block_m/warps rows of dq.
TILES = {
    ("forward", 32): (T(128, 128, 4),),
    ("forward", 64): (T(128, 128, 4),),
    ("forward", 96): (T(128, 64, 4),),
    ("forward", 128): (T(128, 64, 4),),
    ("forward", 192): (T(128, 64, 8), T(64, 32, 4)),
    ("forward", 256): (T(128, 64, 8), T(128, 32, 8), T(64, 32, 4)),
    ("gradients_kv", 32): (T(64, 64, 4),),
    ("gradients_kv", 64): (T(32, 128, 4),),
    ("gradients_kv", 96): (T(64, 128, 8),),
    ("gradients_kv", 128): (T(64, 64, 4), T(32, 64, 4)),
    ("gradients_kv", 192): (T(32, 128, 8), T(16, 64, 4)),
    ("gradients_kv", 256): (T(32, 128, 8), T(32, 64, 4), T(16, 32, 2)),
    ("gradients_q", 32): (T(128, 64, 4),),
    ("gradients_q", 64): (T(128, 64, 4),),
    ("gradients_q", 96): (T(128, 32, 4),),
    ("gradients_q", 128): (T(128, 32, 4),),
    ("gradients_q", 192): (T(128, 32, 8), T(64, 16, 4)),
    ("gradients_q", 256): (T(64, 64, 4), T(64, 32, 4), T(32, 32, 2)),
}
# With softcap or ALiBi, or a scale that is not positive: where TILES would not leave the registers that it takes.
DRESSED = {
    ("forward", 64): T(128, 64, 4),
    ("forward", 128): T(128, 32, 4),
    ("gradients_kv", 96): T(32, 64, 4),
    ("gradients_kv", 128): T(32, 128, 8),
}
# Other assemblers than sm_90's need more registers for the same: before it, and after it.
OLDER = {("gradients_q", 128): T(128, 32, 8)}
OLDER_DRESSED = {("gradients_q", 64): T(128, 32, 4)}
NEWER = {
    ("gradients_kv", 64): T(32, 64, 4),
    ("gradients_kv", 128): T(32, 64, 4),
    ("gradients_q", 64): T(128, 32, 4),
}


def tile(kernel: str, maths: Maths) -> Tile:
    """The tile of `kernel` for these sizes on this device."""
    if kernel == "statistics":
        return T(32, 0, 4)
    special = {} if maths.fold else DRESSED
    if maths.arch < 90:
        special = special | OLDER | ({} if maths.fold else OLDER_DRESSED)
    elif maths.arch > 90:
        special = special | NEWER
    if (kernel, maths.block_d) in special:
        return special[kernel, maths.block_d]
    limit = shared_limit(maths.arch)
    return next(t for t in TILES[kernel, maths.block_d] if shared(kernel, t, maths.block_d) <= limit)


def shared(kernel: str, tile: Tile, block_d: int) -> int:
    """Bytes of dynamic shared memory: what a block keeps, and its ring of tiles."""
    m, n = (rows * block_d * 2 for rows in (tile.block_m, tile.block_n))
    return {
        "forward": m + tile.stages * 2 * n,
        "statistics": 0,
        "gradients_kv": 2 * n + tile.stages * (2 * m + 2 * 4 * tile.block_m),
        "gradients_q": 2 * m + tile.stages * 2 * n + 2 * 4 * tile.block_m,
    }[kernel]


FAMILY = Family(
    sources={
        "forward": "half_forward.cu",
        "statistics": "half_statistics.cu",
        "gradients_kv": "half_gradients_kv.cu",
        "gradients_q": "half_gradients_q.cu",
    },
    head_dims=(32, 64, 96, 128, 192, 256),
    tile=tile,
    shared=shared,
)
