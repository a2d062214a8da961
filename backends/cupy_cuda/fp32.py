"""float32: FlashAttention-2 in IEEE arithmetic without tensor cores (fp32_simt*), sm_80 and newer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash2.backends.cupy_cuda.tiles import Family, Tile, shared_limit

if TYPE_CHECKING:
    from flash2.backends.cupy_cuda.launch import Maths

# padded head_dim -> (warps, stages) of the forward and of either gradient kernel; the first that fits a device's shared
# memory is taken. A warp owns 2048 / head_dim rows, and the other side's tile is head_dim long (fp32_simt.cuh).
FORWARD = {
    64: ((4, 4), (4, 3)),
    128: ((8, 4), (4, 4), (4, 2)),
    256: ((8, 4), (8, 2), (4, 2)),
}
GRADIENTS = {
    64: ((4, 2), (2, 2)),
    128: ((8, 3), (4, 3), (2, 3)),
    256: ((8, 3), (4, 3), (2, 3)),
}


def tile(kernel: str, maths: Maths) -> Tile:
    """The tile of `kernel` for these sizes on this device."""
    if kernel == "statistics":
        return Tile(block_m=32, block_n=0, warps=4)
    limit, d = shared_limit(maths.arch), maths.block_d
    for warps, stages in (FORWARD if kernel == "forward" else GRADIENTS)[d]:
        found = tile_of(kernel, d, warps, stages)
        if shared(kernel, found, d) <= limit:
            return found
    raise AssertionError(f"no tile of {kernel} for head_dim {d} fits {limit} bytes")


def tile_of(kernel: str, block_d: int, warps: int, stages: int) -> Tile:
    """The tile of that many warps: gradients_kv owns rows of keys, the others of queries."""
    rows = 2048 // block_d * warps
    m, n = (block_d, rows) if kernel == "gradients_kv" else (rows, block_d)
    return Tile(block_m=m, block_n=n, warps=warps, stages=stages)


def shared(kernel: str, tile: Tile, block_d: int) -> int:
    """Bytes of dynamic shared memory: the tiles that stay, the weights, and the ring of pieces."""
    if kernel == "statistics":
        return 0
    rows = tile.block_n if kernel == "gradients_kv" else tile.block_m
    staying = 2 if kernel == "forward" else 3
    return 4 * (staying * rows * (block_d + 4) + tile.stages * block_d * (chunk(kernel, tile, block_d) + 1))


def chunk(kernel: str, tile: Tile, block_d: int) -> int:
    """Columns or rows in a piece, CHUNK of the sources."""
    if kernel == "forward":
        return 16 if block_d == 256 else 32
    return 8 if block_d == 256 else 32 if block_d == 64 and tile.warps == 8 else 16


IEEE = Family(
    sources={
        "forward": "fp32_simt_forward.cu",
        "statistics": "fp32_statistics.cu",
        "gradients_kv": "fp32_simt_gradients_kv.cu",
        "gradients_q": "fp32_simt_gradients_q.cu",
    },
    head_dims=(64, 128, 256),
    tile=tile,
    shared=shared,
)
