"""The jitted code of the numba backend: register-tiled products, vector exp and tanh, the two attention loops.

Everything here works on flat float32 arrays and offsets in elements. The vectors run along
queries in the forward pass and along keys in the backward pass, so that the other operand of every
product is read in place, one broadcast scalar at a time: head_dim is never a vector axis of a
score, no length needs to divide anything, and the tails of a panel are lanes nobody reads.

Names: a panel is NR rows of q (or k) transposed to (head_dim, NR); s, p, ds are score tiles; the
suffix _t marks a transposed tile.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# Registers of a product: MR broadcast rows times VECS vectors of LANES floats, chosen to fill the
# register file of the host (AVX-512: 32 of 16 floats, AVX2: 16 of 8, NEON and others: 32 of 4).
_features = binding.get_host_cpu_features()
if _features.get("avx512f"):
    LANES, VECS, MR = 16, 2, 8
elif _features.get("avx2"):
    LANES, VECS, MR = 8, 3, 4
else:
    LANES, VECS, MR = 4, 3, 8
NR = LANES * VECS  # columns of one product
BLOCK_M = NR * max(1, 128 // NR)  # queries per forward task
BLOCK_N = 128  # keys per forward step
BWD_BLOCK_M = 128  # queries per backward step
BWD_BLOCK_N = NR * max(1, 128 // NR)  # keys per backward step
LD_S = BWD_BLOCK_N + 16  # row length of its score tiles: off the powers of two that share cache sets
OPEN = 1 << 40  # a window end that hides nothing
LOG2E = math.log2(math.e)

_f32 = ir.FloatType()
_i32 = ir.IntType(32)
_vec = ir.VectorType(_f32, LANES)
_ivec = ir.VectorType(_i32, LANES)


class _Vec(types.Type):
    """LANES floats in one register."""

    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


vec_type = _Vec()


@register_model(_Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vec)


# ---- vector IR: the pieces the intrinsics below are put together from


def _constant(value, kind=_vec):
    return ir.Constant(kind, [value] * LANES)


def _call(builder, name, *args):
    """An overloaded llvm intrinsic of one vector type, e.g. llvm.fmuladd.v16f32."""
    kind = args[0].type
    suffix = f"v{kind.count}{'f32' if kind.element == _f32 else 'i32'}"
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [arg.type for arg in args]), f"llvm.{name}.{suffix}"
    )
    return builder.call(fn, args)


def _fma(builder, x, y, z):
    return _call(builder, "fmuladd", x, y, z)


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(_vec, ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_ivec, [0] * LANES))


def _select(builder, op, x, y, ordered=True):
    """x if x <op> y else y; what a NaN in x or y gives is y when ordered."""
    compare = builder.fcmp_ordered if ordered else builder.fcmp_unordered
    return builder.select(compare(op, x, y), x, y)


# 2^f on [-1/2, 1/2]: minimax of relative error, degree 6, 1 + f * (c0 + c1 f + ...); error 2e-9.
EXP2_COEFFICIENTS = (
    0.6931472028550811,
    0.24022647913626552,
    0.05550332471100406,
    0.009618437357836433,
    0.001339887442213453,
    0.00015353361882979909,
)
# Adding this rounds a float to an integer n in its low bits, biased like an exponent: n + 127.
_ROUND = 1.5 * 2.0**23 + 127.0


def _exp_parts(builder, x):
    """(2^n, f, q) with exp(x) = 2^n (1 + f q), n an integer and |f| <= 1/2, for |x| < 88.8.

    x is multiplied by log2(e) in two parts without rounding, so that nothing is lost to a large n.
    """
    high = float(np.float32(LOG2E))
    shifted = _fma(builder, x, _constant(high), _constant(_ROUND))
    minus_n = builder.fsub(_constant(_ROUND), shifted)
    f = _fma(builder, x, _constant(LOG2E - high), _fma(builder, x, _constant(high), minus_n))
    q = _constant(EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        q = _fma(builder, q, f, _constant(coefficient))
    bits = builder.shl(builder.bitcast(shifted, _ivec), _constant(23, _ivec))
    return builder.bitcast(bits, _vec), f, q


def _data(context, builder, kind, array, offset):
    """Pointer to element `offset` of a flat array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [offset])


def _load(builder, pointer):
    load = builder.load(builder.bitcast(pointer, _vec.as_pointer()))
    load.align = 4
    return load


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, _vec.as_pointer())).align = 4


def _emit_exp(builder, x):
    """exp(x), error < 1.2 ulp; 0 below -87.7 (there it would be denormal), inf above 88.4, NaN stays NaN."""
    x = _select(builder, ">", _constant(-88.02), x)  # n = -127, whose 2^n comes out as 0
    x = _select(builder, "<", _constant(88.8), x)  # n = 128, whose 2^n comes out as inf
    power, f, q = _exp_parts(builder, x)
    return builder.fmul(power, _fma(builder, f, q, _constant(1.0)))


def _emit_tanh(builder, x):
    """e / (e + 2) with e = exp(2|x|) - 1, which loses nothing near 0; the sign is put back."""
    magnitude = _call(builder, "fabs", x)
    doubled = builder.fmul(_select(builder, "<", _constant(20.0), magnitude), _constant(2.0))
    power, f, q = _exp_parts(builder, doubled)
    e = _fma(builder, power, builder.fmul(f, q), builder.fsub(power, _constant(1.0)))
    return _call(builder, "copysign", builder.fdiv(e, builder.fadd(e, _constant(2.0))), x)


def _emit_finite(builder, x):
    """0 for -inf, the maximum over nothing: then -inf minus it is no NaN."""
    return builder.select(builder.fcmp_ordered("==", x, _constant(-math.inf)), _constant(0.0), x)


def _emit_share(builder, total):
    """1 / total, and 0 for the sum over nothing."""
    share = builder.fdiv(_constant(1.0), total)
    return builder.select(builder.fcmp_ordered("==", total, _constant(0.0)), _constant(0.0), share)


# ---- vector operations usable in jitted code


def _unary(emit):
    def op(typingctx, x):
        return vec_type(vec_type), lambda context, builder, signature, args: emit(builder, *args)

    return intrinsic(op)


def _binary(emit):
    def op(typingctx, x, y):
        return vec_type(vec_type, vec_type), lambda context, builder, signature, args: emit(builder, *args)

    return intrinsic(op)


vexp = _unary(_emit_exp)
vtanh = _unary(_emit_tanh)
vfinite = _unary(_emit_finite)
vshare = _unary(_emit_share)
vabs = _unary(lambda builder, x: _call(builder, "fabs", x))
vadd = _binary(lambda builder, x, y: builder.fadd(x, y))
vsub = _binary(lambda builder, x, y: builder.fsub(x, y))
vmul = _binary(lambda builder, x, y: builder.fmul(x, y))
vmax = _binary(lambda builder, x, y: _select(builder, ">", x, y))  # y where x is NaN


@intrinsic
def vfma(typingctx, x, y, z):
    """x * y + z."""
    return vec_type(vec_type, vec_type, vec_type), lambda context, builder, signature, args: _fma(builder, *args)


@intrinsic
def splat(typingctx, scalar):
    """The vector of LANES times `scalar`."""
    return vec_type(types.float32), lambda context, builder, signature, args: _splat(builder, args[0])


@intrinsic
def lane_numbers(typingctx):
    """0, 1, .. LANES - 1 as floats."""
    numbers = ir.Constant(_vec, [float(lane) for lane in range(LANES)])
    return vec_type(), lambda context, builder, signature, args: numbers


@intrinsic
def load(typingctx, array, offset):
    """array[offset : offset + LANES]."""

    def codegen(context, builder, signature, args):
        return _load(builder, _data(context, builder, signature.args[0], *args))

    return vec_type(array, types.int64), codegen


@intrinsic
def store(typingctx, array, offset, value):
    """array[offset : offset + LANES] = value."""

    def codegen(context, builder, signature, args):
        _store(builder, args[2], _data(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.int64, vec_type), codegen


@intrinsic
def keep_lanes(typingctx, value, first, last, other):
    """value in lanes first .. last, other elsewhere."""

    def codegen(context, builder, signature, args):
        value, first, last, other = args
        lanes = ir.Constant(_ivec, list(range(LANES)))

        def clamped(number):  # a lane number far outside must not wrap when narrowed
            low, high = ir.Constant(number.type, -1), ir.Constant(number.type, LANES)
            number = builder.select(builder.icmp_signed("<", number, low), low, number)
            number = builder.select(builder.icmp_signed(">", number, high), high, number)
            one = builder.insert_element(ir.Constant(_ivec, ir.Undefined), builder.trunc(number, _i32), _i32(0))
            return builder.shuffle_vector(one, one, ir.Constant(_ivec, [0] * LANES))

        keep = builder.and_(
            builder.icmp_signed(">=", lanes, clamped(first)), builder.icmp_signed("<=", lanes, clamped(last))
        )
        return builder.select(keep, value, other)

    return vec_type(vec_type, types.int64, types.int64, vec_type), codegen


@intrinsic
def fetch_add(typingctx, array, index):
    """array[index] += 1 between threads; what it was."""

    def codegen(context, builder, signature, args):
        pointer = _data(context, builder, signature.args[0], *args)
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(array, types.int64), codegen


def _product(rows, a_step_is_row, beta):
    """c[r, :NR] = beta(c)[r, :NR] + sum_k a(r, k) b[k, :NR] for r < rows, as one register tile.

    a(r, k) is a[r * lda + k], or a[k * lda + r] for the transposed reading; beta is "zero", "one"
    or "row" (c is multiplied lane by lane with the NR floats at scale[0]). The sum is complete before c
    is added to it: one long chain of additions would lose more bits.
    """

    def op(typingctx, a, a0, lda, b, b0, ldb, c, c0, ldc, depth, scale):
        def codegen(context, builder, signature, args):
            a, a0, lda, b, b0, ldb, c, c0, ldc, depth, scale = args
            a_pointer = _data(context, builder, signature.args[0], a, a0)
            b_pointer = _data(context, builder, signature.args[3], b, b0)
            c_pointer = _data(context, builder, signature.args[6], c, c0)
            i64 = ldc.type
            c_rows = [builder.gep(c_pointer, [builder.mul(i64(r), ldc)]) for r in range(rows)]
            tile = [[cgutils.alloca_once(builder, _vec) for _ in range(VECS)] for _ in range(rows)]
            factors = []
            if beta == "row":
                s_pointer = _data(context, builder, signature.args[10], scale, i64(0))
                factors = [_load(builder, builder.gep(s_pointer, [i64(v * LANES)])) for v in range(VECS)]
            for r in range(rows):
                for v in range(VECS):
                    builder.store(_constant(0.0), tile[r][v])
            with cgutils.for_range(builder, depth, intp=i64) as loop:
                b_row = builder.gep(b_pointer, [builder.mul(loop.index, ldb)])
                b_vecs = [_load(builder, builder.gep(b_row, [i64(v * LANES)])) for v in range(VECS)]
                for r in range(rows):
                    if a_step_is_row:
                        at = builder.add(builder.mul(loop.index, lda), i64(r))
                    else:
                        at = builder.add(builder.mul(i64(r), lda), loop.index)
                    a_vec = _splat(builder, builder.load(builder.gep(a_pointer, [at])))
                    for v in range(VECS):
                        builder.store(_fma(builder, a_vec, b_vecs[v], builder.load(tile[r][v])), tile[r][v])
            for r in range(rows):
                for v in range(VECS):
                    at, total = builder.gep(c_rows[r], [i64(v * LANES)]), builder.load(tile[r][v])
                    if beta == "one":
                        total = builder.fadd(_load(builder, at), total)
                    elif beta == "row":
                        total = _fma(builder, _load(builder, at), factors[v], total)
                    _store(builder, total, at)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, b, i, i, c, i, i, i, scale), codegen

    return intrinsic(op)


@intrinsic
def transpose_lanes(typingctx, source, s0, lds, target, t0, ldt):
    """target[c, r] = source[r, c] for r, c < LANES, in log2(LANES) rounds of shuffles."""

    def codegen(context, builder, signature, args):
        source, s0, lds, target, t0, ldt = args
        i64 = lds.type
        s_pointer = _data(context, builder, signature.args[0], source, s0)
        t_pointer = _data(context, builder, signature.args[3], target, t0)
        rows = [_load(builder, builder.gep(s_pointer, [builder.mul(i64(r), lds)])) for r in range(LANES)]
        half = LANES // 2
        while half:  # swap the off-diagonal quarters of every block of 2 * half
            low = [(lane & ~half) if not lane & half else LANES + (lane & ~half) for lane in range(LANES)]
            high = [(lane | half) if not lane & half else LANES + lane for lane in range(LANES)]
            for r in range(LANES):
                if not r & half:
                    x, y = rows[r], rows[r | half]
                    rows[r] = builder.shuffle_vector(x, y, ir.Constant(_ivec, low))
                    rows[r | half] = builder.shuffle_vector(x, y, ir.Constant(_ivec, high))
            half //= 2
        for r in range(LANES):
            _store(builder, rows[r], builder.gep(t_pointer, [builder.mul(i64(r), ldt)]))
        return context.get_dummy_value()

    i = types.int64
    return types.void(source, i, i, target, i, i), codegen


_tile_zero, _tail_zero = _product(MR, False, "zero"), _product(1, False, "zero")
_tile_one, _tail_one = _product(MR, False, "one"), _product(1, False, "one")
_tile_row_t, _tail_row_t = _product(MR, True, "row"), _product(1, True, "row")
_tile_one_t, _tail_one_t = _product(MR, True, "one"), _product(1, True, "one")

_jit = njit(nogil=True, error_model="numpy", cache=True)


@_jit
def product(rows, a, a0, lda, b, b0, ldb, c, c0, ldc, depth):
    """c[:rows, :NR] = a[:rows, :depth] b[:depth, :NR]."""
    full = rows - rows % MR
    for r in range(0, full, MR):
        _tile_zero(a, a0 + r * lda, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, c)
    for r in range(full, rows):
        _tail_zero(a, a0 + r * lda, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, c)


@_jit
def product_add(rows, a, a0, lda, b, b0, ldb, c, c0, ldc, depth):
    """c[:rows, :NR] += a[:rows, :depth] b[:depth, :NR]."""
    full = rows - rows % MR
    for r in range(0, full, MR):
        _tile_one(a, a0 + r * lda, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, c)
    for r in range(full, rows):
        _tail_one(a, a0 + r * lda, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, c)


@_jit
def product_add_t(rows, a, a0, lda, b, b0, ldb, c, c0, ldc, depth):
    """c[:rows, :NR] += a[:depth, :rows]^T b[:depth, :NR]."""
    full = rows - rows % MR
    for r in range(0, full, MR):
        _tile_one_t(a, a0 + r, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, c)
    for r in range(full, rows):
        _tail_one_t(a, a0 + r, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, c)


@_jit
def product_scale_add_t(rows, a, a0, lda, b, b0, ldb, c, c0, ldc, depth, scale):
    """c[:rows, :NR] = c[:rows, :NR] * scale[:NR] + a[:depth, :rows]^T b[:depth, :NR]."""
    full = rows - rows % MR
    for r in range(0, full, MR):
        _tile_row_t(a, a0 + r, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, scale)
    for r in range(full, rows):
        _tail_row_t(a, a0 + r, lda, b, b0, ldb, c, c0 + r * ldc, ldc, depth, scale)


@_jit
def transpose(rows, columns, source, s0, lds, target, t0, ldt):
    """target[:columns, :rows] = source[:rows, :columns]^T."""
    full_r, full_c = rows - rows % LANES, columns - columns % LANES
    for r in range(0, full_r, LANES):
        for c in range(0, full_c, LANES):
            transpose_lanes(source, s0 + r * lds + c, lds, target, t0 + c * ldt + r, ldt)
    for r in range(rows):
        for c in range(full_c if r < full_r else 0, columns):
            target[t0 + c * ldt + r] = source[s0 + r * lds + c]


@_jit
def all_finite(x, start, count):
    """No NaN or Inf in x[start : start + count]."""
    bits, worst = x.view(np.int32), np.int32(0)
    for i in range(start, start + count):
        worst = max(worst, bits[i] & np.int32(0x7FFFFFFF))  # an integer maximum vectorises
    return worst < 0x7F800000


@_jit
def finite_part(x, start, count):
    """A copy of x[start : start + count] with 0 for NaN and Inf."""
    out = np.empty(count, np.float32)
    for i in range(count):
        out[i] = x[start + i] if math.isfinite(x[start + i]) else np.float32(0.0)
    return out


@_jit
def add_bad_t(w, ldw, rows, low, high, columns, x, x0, head_dim, acc):
    """acc (head_dim, NR) += x^T w for the NaN and Inf of x alone, over visible pairs alone.

    Row r of x (rows, head_dim) and column c of acc see each other iff low + r <= c <= high + r.
    With finite_part this is a product in which 0 * NaN of a hidden pair is 0, and nothing else differs.
    """
    for at in range(rows * head_dim):
        if not math.isfinite(x[x0 + at]):
            r, d = at // head_dim, at % head_dim
            for c in range(max(low + r, 0), min(high + r + 1, columns)):
                acc[d * NR + c] += x[x0 + at] * w[r * ldw + c]


@_jit
def add_bad(w, ldw, rows, low, high, columns, x, x0, head_dim, acc, ld_acc):
    """acc (rows, head_dim) += w x for the NaN and Inf of x (columns, head_dim); see add_bad_t."""
    for at in range(columns * head_dim):
        if not math.isfinite(x[x0 + at]):
            c, d = at // head_dim, at % head_dim
            for r in range(max(c - high, 0), min(c - low + 1, rows)):
                acc[r * ld_acc + d] += x[x0 + at] * w[r * ldw + c]


# ---- forward


@_jit
def pad(count):
    """count floats rounded up to whole cache lines."""
    return (count + 15) // 16 * 16


@_jit
def forward_floats(head_dim):
    """Floats of scratch one thread of the forward pass needs."""
    return pad(2 * BLOCK_M * head_dim) + pad(BLOCK_N * NR) + pad(2 * BLOCK_M + NR)


@_jit
def modify_scores(s, rows, scale, softcap, slope, distance):
    """s (rows, NR), a column per query, becomes softcap(s * scale) - slope * |distance + r - c|."""
    for r in range(rows):
        for c in range(0, NR, LANES):
            x = load(s, r * NR + c)
            if softcap != 0:
                x = vmul(vtanh(vmul(x, splat(np.float32(scale / softcap)))), splat(np.float32(softcap)))
            else:
                x = vmul(x, splat(np.float32(scale)))
            if slope != 0:
                away = vabs(vsub(splat(np.float32(distance + r - c)), lane_numbers()))
                x = vsub(x, vmul(splat(np.float32(slope)), away))
            store(s, r * NR + c, x)


@_jit
def online_softmax(s, rows, scale, m_i, l_i, alpha):
    """One panel's step of the online softmax (FlashAttention-2, algorithm 1, lines 8 to 10).

    s (rows, NR), a column per query, becomes p = exp(s * scale - m_i); m_i and l_i are brought up to
    date and alpha is the factor by which what was summed before shrinks.
    """
    factor, none, zero = splat(np.float32(scale)), splat(np.float32(-np.inf)), splat(np.float32(0.0))
    for c in range(0, NR, LANES):
        highest = none
        for r in range(rows):
            highest = vmax(load(s, r * NR + c), highest)
        m_old = load(m_i, c)
        m_new = vmax(vmul(highest, factor), m_old)
        m_safe = vfinite(m_new)
        shrink = vexp(vsub(m_old, m_safe))
        total = zero
        m_minus = vsub(zero, m_safe)
        for r in range(rows):
            p = vexp(vfma(load(s, r * NR + c), factor, m_minus))
            store(s, r * NR + c, p)
            total = vadd(total, p)
        store(m_i, c, m_new)
        store(l_i, c, vfma(load(l_i, c), shrink, total))
        store(alpha, c, shrink)


@_jit
def hide(s, rows, low, high):
    """s[r, c] = -inf unless low + r <= c <= high + r."""
    none = splat(np.float32(-np.inf))
    for r in range(rows):
        for c in range(0, NR, LANES):
            store(s, r * NR + c, keep_lanes(load(s, r * NR + c), low + r - c, high + r - c, none))


@_jit
def forward_worker(scratch, counter, q, k, v, o, lse, slopes, sizes, band, scale, softcap):
    """Take tiles of BLOCK_M queries off the counter, the longest ones first, until none is left."""
    batch, heads_q, heads_kv, seq_q, seq_kv, head_dim = sizes
    left, right = band
    heads = batch * heads_q
    tiles = (seq_q + BLOCK_M - 1) // BLOCK_M
    qt = scratch[: BLOCK_M * head_dim]
    acc = scratch[BLOCK_M * head_dim : 2 * BLOCK_M * head_dim]
    at = pad(2 * BLOCK_M * head_dim)
    s = scratch[at : at + BLOCK_N * NR]
    at += pad(BLOCK_N * NR)
    m_i, l_i, alpha = scratch[at : at + BLOCK_M], scratch[at + BLOCK_M : at + 2 * BLOCK_M], scratch[at + 2 * BLOCK_M :]
    modified = softcap != 0 or slopes.size > 0
    sign = np.float32(np.sign(scale))  # goes into q, so that the maximum commutes with the rest of the scale
    magnitude = abs(scale) if scale != 0 else 1.0
    factor = 1.0 if modified else magnitude
    while True:
        task = fetch_add(counter, 0)
        if task >= heads * tiles:
            return
        head = task % heads
        kv = (head // heads_q * heads_kv + head % heads_q * heads_kv // heads_q) * seq_kv * head_dim
        slope = slopes[head] if slopes.size > 0 else np.float32(0.0)
        row0 = (tiles - 1 - task // heads) * BLOCK_M
        row1 = min(row0 + BLOCK_M, seq_q)
        qt[:] = 0
        acc[:] = 0
        m_i[:] = -np.inf
        l_i[:] = 0
        for i0 in range(row0, row1, NR):
            panel = (i0 - row0) * head_dim
            transpose(min(NR, row1 - i0), head_dim, q, (head * seq_q + i0) * head_dim, head_dim, qt, panel, NR)
        if sign != 1:
            for x in range(qt.size):
                qt[x] *= sign
        diagonal = seq_kv - seq_q  # query i stands at key i + diagonal
        begin = max(0, row0 + diagonal - left)
        end = min(seq_kv, row1 - 1 + diagonal + right + 1)
        for j0 in range(begin, end, BLOCK_N):
            for i0 in range(row0, row1, NR):
                i1 = min(i0 + NR, row1) - 1
                see0, see1 = i0 + diagonal - left, i1 + diagonal + right + 1  # what any query of the panel sees
                all0, all1 = i1 + diagonal - left, i0 + diagonal + right + 1  # what every one sees
                first = j0 + max(see0 - j0, 0) // MR * MR  # whole tiles; what is too much is hidden below
                last = min(j0 + BLOCK_N, end, see1)
                if max(see0, j0) >= last:
                    continue
                keys = min((last - first + MR - 1) // MR * MR, seq_kv - first)
                last = first + keys
                panel, here = (i0 - row0) * head_dim, kv + first * head_dim
                product(keys, k, here, head_dim, qt, panel, NR, s, 0, NR, head_dim)
                if modified:
                    modify_scores(s, keys, magnitude, softcap, slope, first - i0 - diagonal)
                all0, all1 = min(max(all0, first), last), min(max(all1, first), last)
                low, high = first - i0 - diagonal - right, first - i0 - diagonal + left
                hide(s, all0 - first, low, high)
                hide(s[(all1 - first) * NR :], last - all1, low + all1 - first, high + all1 - first)
                lanes = slice(i0 - row0, i0 - row0 + NR)
                online_softmax(s, keys, factor, m_i[lanes], l_i[lanes], alpha)
                if all_finite(v, here, (all0 - first) * head_dim) and all_finite(
                    v, kv + all1 * head_dim, (last - all1) * head_dim
                ):
                    product_scale_add_t(head_dim, v, here, head_dim, s, 0, NR, acc, panel, NR, keys, alpha)
                else:
                    clean = finite_part(v, here, keys * head_dim)
                    product_scale_add_t(head_dim, clean, 0, head_dim, s, 0, NR, acc, panel, NR, keys, alpha)
                    add_bad_t(s, NR, keys, low, high, i1 - i0 + 1, v, here, head_dim, acc[panel:])
        for i0 in range(row0, row1, NR):
            finish_rows(
                acc[(i0 - row0) * head_dim :], m_i[i0 - row0 :], l_i[i0 - row0 :], min(NR, row1 - i0), head_dim,
                o[(head * seq_q + i0) * head_dim :], lse[head * seq_q + i0 :],
            )  # fmt: skip


@_jit
def finish_rows(acc, m_i, l_i, rows, head_dim, o, lse):
    """o = acc / l_i and lse = ln(l_i) + m_i, of which a row that saw no key has 0 and -inf."""
    for c in range(0, NR, LANES):
        share = vshare(load(l_i, c))
        for d in range(head_dim):
            store(acc, d * NR + c, vmul(load(acc, d * NR + c), share))
    transpose(head_dim, rows, acc, 0, NR, o, 0, head_dim)
    for r in range(rows):
        if l_i[r] == 0:
            lse[r] = -np.inf
        else:
            lse[r] = m_i[r] + math.log(l_i[r])


@njit(parallel=True, error_model="numpy", cache=True)
def forward(threads, scratch, counter, q, k, v, o, lse, slopes, sizes, band, scale, softcap):
    """Fill o and lse with `threads` workers; all arrays flat, counter zero."""
    each = forward_floats(sizes[5])
    for t in prange(threads):
        forward_worker(
            scratch[t * each : (t + 1) * each], counter, q, k, v, o, lse, slopes, sizes, band, scale, softcap
        )


# ---- backward


@_jit
def wide(head_dim):
    """head_dim rounded up to whole products: the row length of the sums of dq."""
    return (head_dim + NR - 1) // NR * NR


@_jit
def backward_floats(sizes):
    """Floats of scratch one thread of the backward pass needs."""
    _, heads_q, heads_kv, seq_q, _, head_dim = sizes
    columns = 4 * pad(BWD_BLOCK_N * head_dim) + BWD_BLOCK_N * wide(head_dim)
    return columns + 2 * BWD_BLOCK_M * LD_S + pad(heads_q // heads_kv * seq_q)


@njit(nogil=True, error_model="numpy", cache=True, fastmath={"contract", "reassoc"})
def row_dots(x, y, start, rows, head_dim, out):
    """out[r] = x[r] . y[r], the delta of FlashAttention-2 (algorithm 2, line 4)."""
    for r in range(rows):
        total = np.float32(0.0)
        for at in range(start + r * head_dim, start + (r + 1) * head_dim):
            total += x[at] * y[at]
        out[r] = total


@_jit
def score_gradients(s, dp, rows, scale, softcap, slope, lse, delta, low, high, distance):
    """s (rows, NR), a column per key, becomes p = exp(s - lse), and dp the gradient of s before its scale.

    Row r sees columns low + r to high + r; key c stands distance - r + c right of its diagonal.
    """
    zero, one = splat(np.float32(0.0)), splat(np.float32(1.0))
    factor, cap = splat(np.float32(scale)), splat(np.float32(softcap))
    inner = splat(np.float32(scale / softcap if softcap != 0 else 0.0))
    for r in range(rows):
        minus_lse, minus_delta = splat(-lse[r]), splat(-delta[r])
        hides = low + r > 0 or high + r < NR - 1
        for c in range(0, NR, LANES):
            at = r * LD_S + c
            x = load(s, at)
            ds = vadd(load(dp, at), minus_delta)
            if softcap == 0 and slope == 0:
                x = vfma(x, factor, minus_lse)
            else:  # rounded step by step as in modify_scores: then the same errors are in lse, and cancel
                if softcap != 0:
                    t = vtanh(vmul(x, inner))
                    ds = vmul(ds, vfma(vsub(zero, t), t, one))
                    x = vmul(t, cap)
                else:
                    x = vmul(x, factor)
                if slope != 0:
                    away = vabs(vadd(splat(np.float32(distance - r + c)), lane_numbers()))
                    x = vsub(x, vmul(splat(np.float32(slope)), away))
                x = vadd(x, minus_lse)
            p = vexp(x)
            ds = vmul(ds, p)
            if hides:
                p = keep_lanes(p, low + r - c, high + r - c, zero)
                ds = keep_lanes(ds, low + r - c, high + r - c, zero)
            store(s, at, p)
            store(dp, at, ds)


@_jit
def pack_transposed(x, x0, rows, head_dim, xt):
    """The panels of x (rows, head_dim), each (head_dim, NR); the last one filled up with zeros."""
    xt[:] = 0
    for c in range(0, rows, NR):
        transpose(min(NR, rows - c), head_dim, x, x0 + c * head_dim, head_dim, xt, c * head_dim, NR)


@_jit
def pack_columns(x, x0, rows, head_dim, xp):
    """x (rows, head_dim) in column panels, each (BWD_BLOCK_N, NR), with 0 for NaN and Inf; True if it had any."""
    bad = not all_finite(x, x0, rows * head_dim)
    xp[:] = 0
    for r in range(rows):
        for d0 in range(0, head_dim, NR):
            for d in range(d0, min(d0 + NR, head_dim)):
                value = x[x0 + r * head_dim + d]
                xp[d0 * BWD_BLOCK_N + r * NR + d - d0] = value if not bad or math.isfinite(value) else np.float32(0.0)
    return bad


@_jit
def backward_worker(
    scratch, counter, splits, do, q, k, v, o, lse, sums, dq, dk, dv, slopes, sizes, band, scale, softcap
):
    """Take (split of the keys, batch, key head) tasks off counter[0] until none is left.

    A task owns its keys' dk and dv and a copy of dq to sum into, so that no two threads ever add to
    one number: the order of every sum, and with it every bit, is the same whoever runs the task.
    The last task of a key head (the rest of counter) adds the copies up.
    """
    batch, heads_q, heads_kv, seq_q, seq_kv, head_dim = sizes
    left, right = band
    group = heads_q // heads_kv
    diagonal = seq_kv - seq_q  # query i stands at key i + diagonal
    width = wide(head_dim)
    block = BWD_BLOCK_N * head_dim
    at = pad(block)
    kt, vt, dkt, dvt = scratch[:block], scratch[at:], scratch[2 * at :], scratch[3 * at :]
    vt, dkt, dvt = vt[:block], dkt[:block], dvt[:block]
    at *= 4
    kp = scratch[at : at + BWD_BLOCK_N * width]
    at += BWD_BLOCK_N * width
    s, dp = scratch[at : at + BWD_BLOCK_M * LD_S], scratch[at + BWD_BLOCK_M * LD_S : at + 2 * BWD_BLOCK_M * LD_S]
    delta = scratch[at + 2 * BWD_BLOCK_M * LD_S :]
    while True:
        task = fetch_add(counter, 0)
        if task >= splits * batch * heads_kv:
            return
        kv_head, split = task % (batch * heads_kv), task // (batch * heads_kv)
        head0 = kv_head * group  # kv_head counts over the batch too, and so does head0
        row0 = head0 * seq_q
        mine = sums[(split * batch * heads_q + head0) * seq_q * width :][: group * seq_q * width]
        mine[:] = 0
        row_dots(o, do, row0 * head_dim, group * seq_q, head_dim, delta)
        for j0 in range(split * BWD_BLOCK_N, seq_kv, splits * BWD_BLOCK_N):
            j1 = min(j0 + BWD_BLOCK_N, seq_kv)
            key0 = (kv_head * seq_kv + j0) * head_dim
            pack_transposed(k, key0, j1 - j0, head_dim, kt)
            pack_transposed(v, key0, j1 - j0, head_dim, vt)
            k_bad = pack_columns(k, key0, j1 - j0, head_dim, kp)
            dkt[:] = 0
            dvt[:] = 0
            begin, end = max(0, j0 - diagonal - right), min(seq_q, j1 - diagonal + left)
            for g in range(group):
                slope = slopes[head0 + g] if slopes.size > 0 else np.float32(0.0)
                for i0 in range(begin, end, BWD_BLOCK_M):
                    rows = min(BWD_BLOCK_M, end - i0)
                    query = row0 + g * seq_q + i0  # counts over batch and heads
                    for c in range(0, j1 - j0, NR):
                        columns = min(NR, j1 - j0 - c)
                        offset = i0 + diagonal - j0 - c  # the column on the diagonal of row 0
                        low, high = offset - left, offset + right  # what row 0 sees
                        first = max(-high, 0) // MR * MR  # whole tiles; what is too much is hidden below
                        last = min((columns - low + MR - 1) // MR * MR, rows)
                        if max(-high, 0) >= min(columns - low, rows):
                            continue
                        n, low, high = last - first, low + first, high + first  # row 0 is now `first`
                        a0, lse0, delta0 = (query + first) * head_dim, query + first, g * seq_q + i0 + first
                        tile, panel = first * LD_S + c, c * head_dim
                        product(n, q, a0, head_dim, kt, panel, NR, s, tile, LD_S, head_dim)
                        product(n, do, a0, head_dim, vt, panel, NR, dp, tile, LD_S, head_dim)
                        score_gradients(
                            s[tile:], dp[tile:], n, scale, softcap, slope, lse[lse0:], delta[delta0:],
                            low, high, -offset - first,
                        )  # fmt: skip
                        if (low + n - 1 <= 0 and high >= NR - 1) or (
                            all_finite(q, a0, n * head_dim) and all_finite(do, a0, n * head_dim)
                        ):
                            product_add_t(head_dim, do, a0, head_dim, s, tile, LD_S, dvt, panel, NR, n)
                            product_add_t(head_dim, q, a0, head_dim, dp, tile, LD_S, dkt, panel, NR, n)
                        else:
                            clean = finite_part(do, a0, n * head_dim)
                            product_add_t(head_dim, clean, 0, head_dim, s, tile, LD_S, dvt, panel, NR, n)
                            add_bad_t(s[tile:], LD_S, n, low, high, columns, do, a0, head_dim, dvt[panel:])
                            clean = finite_part(q, a0, n * head_dim)
                            product_add_t(head_dim, clean, 0, head_dim, dp, tile, LD_S, dkt, panel, NR, n)
                            add_bad_t(dp[tile:], LD_S, n, low, high, columns, q, a0, head_dim, dkt[panel:])
                    low, high = i0 + diagonal - left - j0, i0 + diagonal + right - j0
                    into = (g * seq_q + i0) * width
                    for d in range(0, width, NR):
                        for r in range(0, rows, MR):
                            n = min(MR, rows - r)
                            c0 = max(low + r, 0) // NR * NR
                            c1 = min((high + r + n + NR - 1) // NR * NR, j1 - j0)
                            if max(low + r, 0) < min(high + r + n, j1 - j0):
                                product_add(
                                    n, dp, r * LD_S + c0, LD_S, kp, d * BWD_BLOCK_N + c0 * NR, NR,
                                    mine, into + r * width + d, width, c1 - c0,
                                )  # fmt: skip
                    if k_bad:
                        add_bad(dp, LD_S, rows, low, high, j1 - j0, k, key0, head_dim, mine[into:], width)
            for c in range(0, j1 - j0, NR):
                columns, panel = min(NR, j1 - j0 - c), c * head_dim
                for x in range(panel, panel + NR * head_dim):
                    dkt[x] *= np.float32(scale)
                transpose(head_dim, columns, dkt, panel, NR, dk, key0 + panel, head_dim)
                transpose(head_dim, columns, dvt, panel, NR, dv, key0 + panel, head_dim)
        if fetch_add(counter, 1 + kv_head) == splits - 1:
            stride = batch * heads_q * seq_q * width
            for i in range(row0, row0 + group * seq_q):
                for d in range(head_dim):
                    total = np.float32(0.0)
                    for x in range(splits):
                        total += sums[x * stride + i * width + d]
                    dq[i * head_dim + d] = total * np.float32(scale)


@njit(parallel=True, error_model="numpy", cache=True)
def backward(
    threads, scratch, counter, splits, do, q, k, v, o, lse, sums, dq, dk, dv, slopes, sizes, band, scale, softcap
):
    """Fill dq, dk and dv with `threads` workers; all arrays flat, counter zero.

    sums holds `splits` copies of dq with rows of wide(head_dim); it may be dq itself if that is one like dq.
    """
    each = backward_floats(sizes)
    for t in prange(threads):
        backward_worker(
            scratch[t * each : (t + 1) * each], counter, splits, do, q, k, v, o, lse, sums, dq, dk, dv,
            slopes, sizes, band, scale, softcap,
        )  # fmt: skip
