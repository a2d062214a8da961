"""What a kernel before the kernel makes of tensors that many programs read: parts in bfloat16, or transposed copies.

Done inside the attention kernels, that work repeats for every tile that meets the same rows: seq / BLOCK_M times.
"""

import triton
import triton.language as tl

from flash2.backends.triton_fa2.tiles import evens_first, head_of, load_tile, split


@triton.jit(do_not_specialize=["part", "heads", "seq"])
def split_heads(
    x, parts, stride_xb, stride_xh, stride_xn, part, stride_pn, heads, seq, head_dim,
    PAD_D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x (batch, heads, seq, head_dim) float32 -> parts (PARTS, batch, heads, seq, head_dim) bfloat16, `part` elements
    apart, whose rows are stride_pn apart; one program a tile of BLOCK_N rows."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(seq, BLOCK_N)
    start = pid % tiles * BLOCK_N
    batch = pid // tiles // heads
    head = pid // tiles % heads
    x_head = head_of(x, batch, head, stride_xb, stride_xh, False)
    tile = load_tile(x_head, batch, head, start, seq, stride_xn, head_dim, BLOCK_N, BLOCK_D, PAD_D, True, False, WIDE, 1)  # fmt: skip
    rows = start + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    out = parts + ((pid // tiles).to(tl.int64) * seq + rows[:, None]) * stride_pn + cols[None, :]
    mask = (rows[:, None] < seq) & (cols[None, :] < head_dim) if PAD_D else rows[:, None] < seq
    pieces = split(tile, PARTS)
    for n in tl.static_range(PARTS):
        tl.store(out + n * part.to(tl.int64), pieces[n], mask=mask)


@triton.jit(do_not_specialize=["heads"])
def turn_heads(
    x, turned, stride_xb, stride_xh, stride_xn, stride_tn, heads, seq, head_dim,
    PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x (batch, heads, seq, head_dim) -> turned (batch, heads, head_dim, padded), whose rows are stride_tn apart.

    Its columns are in the order of evens_first(), and as many as fill the last eight: 0 past seq.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(seq, BLOCK_N)
    start = pid % tiles * BLOCK_N
    batch = pid // tiles // heads
    head = pid // tiles % heads
    x_head = head_of(x, batch, head, stride_xb, stride_xh, False)
    tile = load_tile(x_head, batch, head, start, seq, stride_xn, head_dim, BLOCK_N, BLOCK_D, PAD_D, True, False, WIDE, 1)  # fmt: skip
    rows = start + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    padded = tl.cdiv(seq, 8) * 8
    out = turned + ((pid // tiles).to(tl.int64) * head_dim + cols[:, None]) * stride_tn + rows[None, :]
    mask = (cols[:, None] < head_dim) & (rows[None, :] < padded) if PAD_D else rows[None, :] < padded
    tl.store(out, evens_first(tl.trans(tile)), mask=mask)
