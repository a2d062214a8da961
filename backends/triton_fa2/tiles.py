"""What forward and backward kernels share: loading a tile, multiplying, masking, the logits.

Logits live in the log2 domain inside a kernel (exp2 is one instruction, exp is two), with the
factor log2(e) folded into `scale` on the host. Indices: `i` is a query's place on the bottom-right
diagonal (row + seq_kv - seq_q), `j` a key, both shaped to broadcast over the tile.
"""

import os

import triton
import triton.language as tl

# Chosen by Triton when it is imported, so read once, here, for everybody.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
CHUNK = tl.constexpr(16)
INTERPRETED = tl.constexpr(INTERPRET)
# Which tiles of a loop are masked.
NONE, EDGES, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """acc + a @ b in float32; PRECISION is how float32 operands meet the tensor cores.

    With PARTS > 1 both come as bfloat16 parts that sum up to them, and the largest products of parts are added, the
    small ones first: bf16x3 of 2 parts, bf16x6 of 3 (Henry, Tang, Heinecke 2019). They meet acc in an addition of
    their own: the tensor cores cut what they add where float32 rounds, and over many tiles that shows.
    """
    if PARTS > 1:
        if PARTS == 3:
            x = tl.dot(a[2], b[0])
            x = tl.dot(a[0], b[2], x)
            x = tl.dot(a[1], b[1], x)
            x = tl.dot(a[1], b[0], x)
        else:
            x = tl.dot(a[1], b[0])
        x = tl.dot(a[0], b[1], x)
        x = tl.dot(a[0], b[0], x)
        if acc is None:
            return x
        else:
            return acc + x
    elif INTERPRETED:  # the interpreter multiplies bf16 by bit pattern, and knows no classes of float32 maths
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_in_chunks(a, start_a, seq_a, stride_a, b, start_b, seq_b, stride_b, head_dim,
                  ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
                  TAIL_A: tl.constexpr, TAIL_B: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Rows of a @ rows of b transposed, in IEEE float32, CHUNK columns of head_dim at a time.

    Without tensor cores every thread multiplies whole rows of its operands: those of a full head_dim are more than
    its registers hold, and a compiler that keeps one of them over a loop spills it.
    """
    acc = tl.zeros([ROWS_A, ROWS_B], tl.float32)
    if BLOCK_D > 64 or (PAD_D and BLOCK_D > 32):  # unrolled, the chunks' addresses and masks spill
        for d in tl.range(0, head_dim, CHUNK, num_stages=1):
            acc = add_chunk(acc, d, a, start_a, seq_a, stride_a, b, start_b, seq_b, stride_b, head_dim, ROWS_A, ROWS_B, PAD_D, TAIL_A, TAIL_B, WIDE)  # fmt: skip
    else:
        for d in tl.static_range(0, BLOCK_D, CHUNK):
            acc = add_chunk(acc, d, a, start_a, seq_a, stride_a, b, start_b, seq_b, stride_b, head_dim, ROWS_A, ROWS_B, PAD_D, TAIL_A, TAIL_B, WIDE)  # fmt: skip
    return acc


@triton.jit
def add_chunk(acc, d, a, start_a, seq_a, stride_a, b, start_b, seq_b, stride_b, head_dim,
              ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, PAD_D: tl.constexpr,
              TAIL_A: tl.constexpr, TAIL_B: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """acc + dot_in_chunks() of the CHUNK columns from d on."""
    x = load_tile(a + d, 0, 0, start_a, seq_a, stride_a, head_dim - d, ROWS_A, CHUNK, PAD_D, TAIL_A, False, WIDE, 1)
    y = load_tile(b + d, 0, 0, start_b, seq_b, stride_b, head_dim - d, ROWS_B, CHUNK, PAD_D, TAIL_B, False, WIDE, 1)
    return dot(x, tl.trans(y), acc, "ieee", 1)


@triton.jit
def turn(x, PARTS: tl.constexpr):
    """x transposed, each part of it."""
    if PARTS == 3:
        return tl.trans(x[0]), tl.trans(x[1]), tl.trans(x[2])
    elif PARTS == 2:
        return tl.trans(x[0]), tl.trans(x[1])
    else:
        return tl.trans(x)


@triton.jit
def split(x, PARTS: tl.constexpr):
    """float32 x in PARTS bfloat16 parts, each what the ones before it leave over."""
    if PARTS == 1:
        return x
    else:
        hi = x.to(tl.bfloat16)
        finite = tl.abs(x) < float("inf")  # inf - inf would be nan
        rest = tl.where(finite, x - hi.to(tl.float32), 0.0)
        mid = rest.to(tl.bfloat16)
        if PARTS == 2:
            return hi, mid
        else:
            return hi, mid, (rest - mid.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def operand(x, other, PARTS: tl.constexpr, TURNED: tl.constexpr):
    """float32 x as dot() multiplies it with `other`: in the other's dtype, in as many parts, or, for one that
    prepare.turn_heads() wrote, with the columns in the order of its rows."""
    if PARTS > 1:
        return split(x, PARTS)
    elif TURNED:
        return evens_first(x)
    else:
        return narrow(x, other.dtype)


@triton.jit
def evens_first(x):
    """x with the columns of every eight in the order 0 2 4 6 1 3 5 7.

    Thread t of four holds columns 2t and 2t + 1 of what the tensor cores wrote, and has to hand them columns t and
    t + 4 of a TF32 operand. In this order those are the same numbers; in their own, it takes a shuffle and two selects.
    """
    rows: tl.constexpr = x.shape[0]
    cols: tl.constexpr = x.shape[1]
    return x.reshape([rows, cols // 8, 4, 2]).trans(0, 1, 3, 2).reshape([rows, cols])


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the low half off: round there beforehand
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def head_of(x, batch, head, stride_b, stride_h, TMA: tl.constexpr):
    """Where load_tile reads one head: a pointer to it, or the whole tensor's descriptor."""
    if TMA:
        return x
    else:
        return x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tile(x, batch, head, start, seq, stride, head_dim,
              ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
              TAIL: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Rows start.. of a head_of() head, [ROWS, BLOCK_D]; 0 past seq (if TAIL) and past head_dim.

    With PARTS > 1 that many bfloat16 tiles, from a tensor that prepare.split_heads() wrote.
    """
    if PARTS > 1:
        hi = x.load([0, batch, head, start, 0]).reshape([ROWS, BLOCK_D])
        mid = x.load([1, batch, head, start, 0]).reshape([ROWS, BLOCK_D])
        if PARTS == 2:
            return hi, mid
        else:
            return hi, mid, x.load([2, batch, head, start, 0]).reshape([ROWS, BLOCK_D])
    elif TMA:  # the hardware fills what is out of bounds with 0
        return x.load([batch, head, start, 0]).reshape([ROWS, BLOCK_D])
    else:
        rows = tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK_D)
        ptrs = x + start.to(tl.int64) * stride + row_offsets(rows, stride, WIDE)[:, None] + cols[None, :]
        if TAIL and PAD_D:
            return tl.load(ptrs, mask=(rows[:, None] < seq - start) & (cols[None, :] < head_dim), other=0.0)
        elif TAIL:
            return tl.load(ptrs, mask=rows[:, None] < seq - start, other=0.0)
        elif PAD_D:
            return tl.load(ptrs, mask=cols[None, :] < head_dim, other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def load_own(x, batch, head, start, seq, stride, head_dim,
             ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
             TMA: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, RESIDENT: tl.constexpr):  # fmt: skip
    """load_tile() of the rows that a program keeps for its whole loop: split here, into registers, or, if RESIDENT,
    beforehand, and so many of the parts left in shared memory."""
    if RESIDENT == 0:
        tile = load_tile(x, batch, head, start, seq, stride, head_dim, ROWS, BLOCK_D, PAD_D, True, TMA, WIDE, 1)
        return split(tile, PARTS)
    else:
        parts = load_tile(x, batch, head, start, seq, stride, head_dim, ROWS, BLOCK_D, PAD_D, True, TMA, WIDE, PARTS)
        if RESIDENT == PARTS:
            return parts
        else:  # what is computed, be it nothing new, the compiler keeps in registers
            hi = tl.where(parts[0] == parts[0], parts[0], float("nan"))
            if PARTS == 2:
                return hi, parts[1]
            else:
                return hi, parts[1], parts[2]


@triton.jit
def load_turned(x, batch, head, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start.. of a head of x, (batch, heads, head_dim, seq) as prepare.turn_heads() wrote it, [ROWS, BLOCK_D]:
    those of every eight in the order of evens_first()."""
    return tl.trans(x.load([batch, head, 0, start]).reshape([BLOCK_D, ROWS]))


@triton.jit
def load_rows(x, index, start, padded, ROWS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS] numbers from `start` on of row `index` of x (rows, padded); through shared memory with TMA."""
    if TMA:
        return x.load([index, start]).reshape([ROWS])
    else:
        return tl.load(x + index.to(tl.int64) * padded + start + tl.arange(0, ROWS))


@triton.jit
def store_tile(x, tile, start, seq, stride, head_dim,
               ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Write the rows below seq and columns below head_dim of `tile` to the head at pointer x."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = x + start.to(tl.int64) * stride + row_offsets(rows, stride, WIDE)[:, None] + cols[None, :]
    tile = narrow(tile, x.dtype.element_ty)
    if PAD_D:
        tl.store(ptrs, tile, mask=(rows[:, None] < seq - start) & (cols[None, :] < head_dim))
    else:  # a mask over columns that may end anywhere makes every store one of a single element
        tl.store(ptrs, tile, mask=rows[:, None] < seq - start)


@triton.jit
def row_offsets(rows, stride, WIDE: tl.constexpr):
    """rows * stride; in 64 bits where a tile of rows spans more than 2^31 elements."""
    if WIDE:
        return rows.to(tl.int64) * stride
    else:
        return rows * stride


@triton.jit
def key_range(start_m, offset, seq_q, seq_kv, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(lo, full_lo, full_hi, hi) for the query rows start_m..: keys [lo, hi) are visible to some row, of which
    [full_lo, full_hi) to every one; all but hi are multiples of BLOCK_N."""
    first = start_m + offset
    last = tl.minimum(start_m + BLOCK_M, seq_q) - 1 + offset
    lo = 0
    hi = seq_kv
    full_lo = 0
    full_hi = seq_kv
    if LEFT:
        lo = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        hi = tl.minimum(hi, tl.maximum(last + right + 1, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(first + right + 1, 0))
    full_hi = full_hi // BLOCK_N * BLOCK_N
    if LEFT:
        full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_N) * BLOCK_N)
        full_hi = tl.maximum(full_lo, full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def visible(i, j, seq_kv, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, TAIL: tl.constexpr):
    """True where query i sees key j: the band left..right beside the diagonal, and no key past seq_kv."""
    keep = j <= i + right if RIGHT else j >= 0
    if LEFT:
        keep = keep & (j >= i - left)
    if TAIL:
        keep = keep & (j < seq_kv)
    return keep


@triton.jit
def logits(s, i, j, scale, cap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """(logits, tanh): q.k products -> softcap(s * scale) + alibi, and the tanh that the softcap took.

    With SOFTCAP, `scale` is scale/softcap and `cap` is softcap*log2(e); without, `scale` has the log2(e).
    """
    s = s * scale
    t = s
    if SOFTCAP:
        t = tanh(s)
        s = cap * t
    if ALIBI:
        s = s - slope * tl.abs(i - j).to(tl.float32)
    return s, t


@triton.jit
def tanh(x):
    """tanh to a few ulp. Small arguments by a polynomial (Cephes tanhf), where 1 - exp(-2x) cancels."""
    z = x * x
    small = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
             - 3.33332819422e-1) * z * x + x  # fmt: skip
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2|x|)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.390625, small, tl.where(x < 0.0, -large, large))
