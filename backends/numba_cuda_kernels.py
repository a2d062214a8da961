"""FlashAttention-2 in numba's CUDA Python: IEEE float32 without tensor cores, for GPUs and for numba's simulator.

A block is SIDE x SIDE threads and owns TILE queries (or keys); it walks over the tiles of the other side. Thread
(tx, ty) holds rows ty + SIDE * i and columns tx + SIDE * j of every tile, so that a warp reads shared memory without
bank conflicts. Operands come through shared memory CHUNK columns or rows at a time, which bounds it for any head_dim;
sums stay in registers. A matrix is a tuple (flat array, offset of its head, row stride, column stride, rows).
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

from numba import config, cuda, float32, int32

SIMULATED = bool(config.ENABLE_CUDASIM)
# In the simulator every thread is one of Python's, and a small tile has the same ends and middles.
SIDE, EACH, CHUNK = (4, 2, 4) if SIMULATED else (16, 4, 16)
TILE = SIDE * EACH
PAD_2, PAD_1 = TILE + 2, TILE + 1  # rows of shared tiles, so that a warp's accesses fall into different banks
INF, ZERO, ONE = float32(math.inf), float32(0.0), float32(1.0)


@functools.cache
def kernels(columns: int) -> SimpleNamespace:
    """forward, statistics, gradients_kv and gradients_q for head_dim <= SIDE * columns: what a thread holds of a row
    of o must be known when the kernel is compiled. Threads (SIDE, SIDE), and blocks as each one says."""
    wide = SIDE * columns

    @cuda.jit(device=True)
    def matrix(x, strides, batch, head, rows):
        """The (rows, head_dim) matrix of one head; offsets are 64 bits wide."""
        return x, batch * strides[0] + head * strides[1], strides[2], strides[3], rows

    @cuda.jit(device=True)
    def element(x, row, d, head_dim):
        """x[row, d], 0 outside."""
        if row < x[4] and d < head_dim:
            return x[0][x[1] + row * x[2] + d * x[3]]
        return ZERO

    @cuda.jit(device=True)
    def seen(row, rows, others, before, after):
        """[low, high) of the `others` that `row` of a side of `rows` sees; the two sides end together."""
        if row >= rows:
            return 0, 0
        at = row + others - rows
        return max(0, at - before), max(0, min(others, at + after + 1))

    @cuda.jit(device=True)
    def seen_by_tile(start, rows, others, before, after):
        """[low, high) of the `others` that some row of the tile at `start` sees, low at the start of a tile."""
        low, _ = seen(start, rows, others, before, after)
        _, high = seen(min(start + TILE, rows) - 1, rows, others, before, after)
        return low // TILE * TILE, high

    @cuda.jit(device=True)
    def logit(x, i, j, scale, softcap, slope):
        """(logit, its derivative by scale * q.k) of q.k = x for query i and key j, i counted from the last key's."""
        s, derivative = x * scale, ONE
        if softcap > ZERO:
            t = float32(math.tanh(s / softcap))
            s, derivative = softcap * t, ONE - t * t
        return s - slope * float32(abs(i - j)), derivative

    @cuda.jit(device=True)
    def weight(x, dp, i, j, lse, delta, scale, softcap, slope):
        """(p, ds) of a pair that is seen, ds being the gradient of scale * q.k."""
        s, derivative = logit(x, i, j, scale, softcap, slope)
        p = float32(math.exp(s - lse))
        return p, p * (dp - delta) * derivative

    @cuda.jit(device=True)
    def product(s, x, x_start, y, y_start, head_dim, xs, ys):
        """s = x y^T for the tiles of x and y at x_start and y_start."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        for i in range(EACH):
            for j in range(EACH):
                s[i, j] = ZERO
        for d0 in range(0, head_dim, CHUNK):
            for n in range(ty * SIDE + tx, TILE * CHUNK, SIDE * SIDE):
                row, d = n // CHUNK, n % CHUNK
                xs[d, row] = element(x, x_start + row, d0 + d, head_dim)
                ys[d, row] = element(y, y_start + row, d0 + d, head_dim)
            cuda.syncthreads()
            for d in range(CHUNK):
                for i in range(EACH):
                    for j in range(EACH):
                        s[i, j] += xs[d, ty + SIDE * i] * ys[d, tx + SIDE * j]
            cuda.syncthreads()

    @cuda.jit(device=True)
    def accumulate(acc, ws, y, y_start, low, high, head_dim, rows):
        """acc += w y over the pairs that are seen: a hidden weight of 0 does not meet the NaN it is hidden from."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        for n0 in range(0, TILE, CHUNK):
            for n in range(ty * SIDE + tx, CHUNK * wide, SIDE * SIDE):
                rows[n // wide, n % wide] = element(y, y_start + n0 + n // wide, n % wide, head_dim)
            cuda.syncthreads()
            for n in range(CHUNK):
                for i in range(EACH):
                    if low[i] <= y_start + n0 + n < high[i]:
                        w = ws[ty + SIDE * i, n0 + n]
                        for c in range(columns):
                            acc[i, c] += w * rows[n, tx + SIDE * c]
            cuda.syncthreads()

    @cuda.jit(device=True)
    def clear(acc):
        """acc = 0."""
        for i in range(EACH):
            for c in range(columns):
                acc[i, c] = ZERO

    @cuda.jit(device=True)
    def store(out, acc, scale, head, start, rows, head_dim):
        """out[head, start ...] = acc * scale[row], out contiguous."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        for i in range(EACH):
            row = start + ty + SIDE * i
            for c in range(columns):
                if row < rows and tx + SIDE * c < head_dim:
                    out[(head * rows + row) * head_dim + tx + SIDE * c] = acc[i, c] * scale[i]

    @cuda.jit
    def forward(q, k, v, o, lse, slopes, q_strides, k_strides, v_strides, slope_strides, sizes, band, scale, softcap):
        """o and lse of TILE queries of a head; ceil(seq_q / TILE) * batch * heads_q blocks."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        heads_q, heads_kv, seq_q, seq_kv, head_dim, alibi = sizes
        left, right = band
        tiles = (seq_q + TILE - 1) // TILE
        head, start = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * TILE
        batch, h = head // heads_q, head % heads_q
        h_kv = h // (heads_q // heads_kv)
        slope = slopes[batch * slope_strides[0] + h * slope_strides[1]] if alibi else ZERO
        q_mat = matrix(q, q_strides, batch, h, seq_q)
        k_mat = matrix(k, k_strides, batch, h_kv, seq_kv)
        v_mat = matrix(v, v_strides, batch, h_kv, seq_kv)

        xs = cuda.shared.array((CHUNK, PAD_2), float32)
        ys = cuda.shared.array((CHUNK, PAD_2), float32)
        ws = cuda.shared.array((TILE, PAD_1), float32)
        rows = cuda.shared.array((CHUNK, wide), float32)
        parts = cuda.shared.array((TILE, SIDE), float32)
        s = cuda.local.array((EACH, EACH), float32)
        acc = cuda.local.array((EACH, columns), float32)
        m_i = cuda.local.array(EACH, float32)
        l_i = cuda.local.array(EACH, float32)
        low = cuda.local.array(EACH, int32)
        high = cuda.local.array(EACH, int32)
        clear(acc)
        for i in range(EACH):
            m_i[i], l_i[i] = -INF, ZERO
            low[i], high[i] = seen(start + ty + SIDE * i, seq_q, seq_kv, left, right)

        first, last = seen_by_tile(start, seq_q, seq_kv, left, right)
        for n0 in range(first, last, TILE):
            product(s, q_mat, start, k_mat, n0, head_dim, xs, ys)
            for i in range(EACH):
                at = start + ty + SIDE * i + seq_kv - seq_q
                top = m_i[i]
                for j in range(EACH):
                    key = n0 + tx + SIDE * j
                    value = -INF
                    if low[i] <= key < high[i]:
                        value, _ = logit(s[i, j], at, key, scale, softcap, slope)
                    s[i, j] = value
                    if value > top:
                        top = value
                parts[ty + SIDE * i, tx] = top
            cuda.syncthreads()
            for i in range(EACH):
                m_new = m_i[i]
                for t in range(SIDE):
                    m_new = max(m_new, parts[ty + SIDE * i, t])
                m_safe = ZERO if m_new == -INF else m_new  # a row that saw no key stays finite
                alpha = float32(math.exp(m_i[i] - m_safe))
                m_i[i], l_i[i] = m_new, l_i[i] * alpha
                for c in range(columns):
                    acc[i, c] *= alpha
                for j in range(EACH):
                    p = float32(math.exp(s[i, j] - m_safe))
                    l_i[i] += p
                    ws[ty + SIDE * i, tx + SIDE * j] = p
            accumulate(acc, ws, v_mat, n0, low, high, head_dim, rows)

        for i in range(EACH):  # each thread has the sum of its own columns
            parts[ty + SIDE * i, tx] = l_i[i]
        cuda.syncthreads()
        for i in range(EACH):
            total = ZERO
            for t in range(SIDE):
                total += parts[ty + SIDE * i, t]
            row = start + ty + SIDE * i
            if tx == 0 and row < seq_q:
                lse[head * seq_q + row] = -INF if total == ZERO else m_i[i] + float32(math.log(total))
            l_i[i] = ZERO if total == ZERO else ONE / total
        store(o, acc, l_i, head, start, seq_q, head_dim)

    @cuda.jit
    def statistics(do, o, delta, do_strides, o_strides, sizes):
        """delta[i] = do[i].o[i], a thread a row; ceil(seq_q / SIDE**2) * batch * heads_q blocks."""
        heads_q, _, seq_q, _, head_dim, _ = sizes
        blocks = (seq_q + SIDE * SIDE - 1) // (SIDE * SIDE)
        head = cuda.blockIdx.x // blocks
        row = cuda.blockIdx.x % blocks * (SIDE * SIDE) + cuda.threadIdx.y * SIDE + cuda.threadIdx.x
        do_mat = matrix(do, do_strides, head // heads_q, head % heads_q, seq_q)
        o_mat = matrix(o, o_strides, head // heads_q, head % heads_q, seq_q)
        total = ZERO
        for d in range(head_dim):
            total += element(do_mat, row, d, head_dim) * element(o_mat, row, d, head_dim)
        if row < seq_q:
            delta[head * seq_q + row] = total

    @cuda.jit
    def gradients_kv(
        do, q, k, v, lse, delta, dk, dv, slopes, do_strides, q_strides, k_strides, v_strides, slope_strides,
        sizes, band, scale, softcap,
    ):  # fmt: skip
        """dk and dv of TILE keys of a head, from all its query heads; ceil(seq_kv / TILE) * batch * heads_kv blocks."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        heads_q, heads_kv, seq_q, seq_kv, head_dim, alibi = sizes
        left, right = band
        tiles = (seq_kv + TILE - 1) // TILE
        head, start = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * TILE
        batch, h_kv = head // heads_kv, head % heads_kv
        group = heads_q // heads_kv
        k_mat = matrix(k, k_strides, batch, h_kv, seq_kv)
        v_mat = matrix(v, v_strides, batch, h_kv, seq_kv)

        xs = cuda.shared.array((CHUNK, PAD_2), float32)
        ys = cuda.shared.array((CHUNK, PAD_2), float32)
        ws = cuda.shared.array((TILE, PAD_1), float32)
        rows = cuda.shared.array((CHUNK, wide), float32)
        s = cuda.local.array((EACH, EACH), float32)
        dp = cuda.local.array((EACH, EACH), float32)
        dk_acc = cuda.local.array((EACH, columns), float32)
        dv_acc = cuda.local.array((EACH, columns), float32)
        factor = cuda.local.array(EACH, float32)
        low = cuda.local.array(EACH, int32)
        high = cuda.local.array(EACH, int32)
        clear(dk_acc)
        clear(dv_acc)
        for i in range(EACH):  # seen from a key, what is left of the diagonal is right of it
            low[i], high[i] = seen(start + ty + SIDE * i, seq_kv, seq_q, right, left)

        first, last = seen_by_tile(start, seq_kv, seq_q, right, left)
        for h in range(h_kv * group, (h_kv + 1) * group):
            slope = slopes[batch * slope_strides[0] + h * slope_strides[1]] if alibi else ZERO
            q_mat = matrix(q, q_strides, batch, h, seq_q)
            do_mat = matrix(do, do_strides, batch, h, seq_q)
            row0 = (batch * heads_q + h) * seq_q
            for m0 in range(first, last, TILE):
                product(s, k_mat, start, q_mat, m0, head_dim, xs, ys)
                product(dp, v_mat, start, do_mat, m0, head_dim, xs, ys)
                for i in range(EACH):
                    key = start + ty + SIDE * i
                    for j in range(EACH):
                        query = m0 + tx + SIDE * j
                        p, ds = ZERO, ZERO
                        if low[i] <= query < high[i]:
                            at, n = query + seq_kv - seq_q, row0 + query
                            p, ds = weight(s[i, j], dp[i, j], at, key, lse[n], delta[n], scale, softcap, slope)
                        dp[i, j] = ds
                        ws[ty + SIDE * i, tx + SIDE * j] = p
                accumulate(dv_acc, ws, do_mat, m0, low, high, head_dim, rows)
                for i in range(EACH):
                    for j in range(EACH):
                        ws[ty + SIDE * i, tx + SIDE * j] = dp[i, j]
                accumulate(dk_acc, ws, q_mat, m0, low, high, head_dim, rows)

        for i in range(EACH):
            factor[i] = ONE
        store(dv, dv_acc, factor, head, start, seq_kv, head_dim)
        for i in range(EACH):
            factor[i] = scale
        store(dk, dk_acc, factor, head, start, seq_kv, head_dim)

    @cuda.jit
    def gradients_q(
        do, q, k, v, lse, delta, dq, slopes, do_strides, q_strides, k_strides, v_strides, slope_strides,
        sizes, band, scale, softcap,
    ):  # fmt: skip
        """dq of TILE queries of a head; ceil(seq_q / TILE) * batch * heads_q blocks."""
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        heads_q, heads_kv, seq_q, seq_kv, head_dim, alibi = sizes
        left, right = band
        tiles = (seq_q + TILE - 1) // TILE
        head, start = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * TILE
        batch, h = head // heads_q, head % heads_q
        h_kv = h // (heads_q // heads_kv)
        slope = slopes[batch * slope_strides[0] + h * slope_strides[1]] if alibi else ZERO
        q_mat = matrix(q, q_strides, batch, h, seq_q)
        do_mat = matrix(do, do_strides, batch, h, seq_q)
        k_mat = matrix(k, k_strides, batch, h_kv, seq_kv)
        v_mat = matrix(v, v_strides, batch, h_kv, seq_kv)

        xs = cuda.shared.array((CHUNK, PAD_2), float32)
        ys = cuda.shared.array((CHUNK, PAD_2), float32)
        ws = cuda.shared.array((TILE, PAD_1), float32)
        rows = cuda.shared.array((CHUNK, wide), float32)
        s = cuda.local.array((EACH, EACH), float32)
        dp = cuda.local.array((EACH, EACH), float32)
        acc = cuda.local.array((EACH, columns), float32)
        factor = cuda.local.array(EACH, float32)
        low = cuda.local.array(EACH, int32)
        high = cuda.local.array(EACH, int32)
        clear(acc)
        for i in range(EACH):
            low[i], high[i] = seen(start + ty + SIDE * i, seq_q, seq_kv, left, right)
            factor[i] = scale

        first, last = seen_by_tile(start, seq_q, seq_kv, left, right)
        for n0 in range(first, last, TILE):
            product(s, q_mat, start, k_mat, n0, head_dim, xs, ys)
            product(dp, do_mat, start, v_mat, n0, head_dim, xs, ys)
            for i in range(EACH):
                query = start + ty + SIDE * i
                at, n = query + seq_kv - seq_q, head * seq_q + query
                for j in range(EACH):
                    key = n0 + tx + SIDE * j
                    ds = ZERO
                    if low[i] <= key < high[i]:
                        _, ds = weight(s[i, j], dp[i, j], at, key, lse[n], delta[n], scale, softcap, slope)
                    ws[ty + SIDE * i, tx + SIDE * j] = ds
            accumulate(acc, ws, k_mat, n0, low, high, head_dim, rows)
        store(dq, acc, factor, head, start, seq_q, head_dim)

    return SimpleNamespace(forward=forward, statistics=statistics, gradients_kv=gradients_kv, gradients_q=gradients_q)
