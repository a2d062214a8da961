"""The backward kernels: FlashAttention-2 (Dao 2023), algorithm 2, without atomics.

Two kernels recompute the probabilities: one owns a tile of keys and loops over queries for dK and dV,
one owns a tile of queries and loops over keys for dQ. That is 7 products where one fused kernel has 5,
and every sum has one fixed order: the gradients are bitwise reproducible.
"""

import triton
import triton.language as tl

from flash2.backends.triton_fa2.tiles import (
    ALL,
    EDGES,
    NONE,
    dot,
    dot_in_chunks,
    head_of,
    key_range,
    load_own,
    load_rows,
    load_tile,
    load_turned,
    logits,
    operand,
    store_tile,
    turn,
    visible,
)


@triton.jit(do_not_specialize=["heads", "seq_q", "rows_padded"])
def row_statistics(
    o, do, lse, lse2, delta,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    heads, seq_q, rows_padded, head_dim,
    PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[i] = o[i].do[i], and lse in the log2 domain, both padded to rows_padded rows a head.

    lse2 is +inf where there is no row and where a row saw no key: exp2(s - lse2) is 0 there, without a mask.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows_padded, BLOCK_M)
    start = pid % tiles * BLOCK_M
    batch = pid // tiles // heads
    head = pid // tiles % heads
    rows = start + tl.arange(0, BLOCK_M)
    o_head = head_of(o, batch, head, stride_ob, stride_oh, False)
    g_head = head_of(do, batch, head, stride_gb, stride_gh, False)
    o_tile = load_tile(o_head, batch, head, start, seq_q, stride_om, head_dim, BLOCK_M, BLOCK_D, PAD_D, True, False, WIDE, 1)  # fmt: skip
    g_tile = load_tile(g_head, batch, head, start, seq_q, stride_gm, head_dim, BLOCK_M, BLOCK_D, PAD_D, True, False, WIDE, 1)  # fmt: skip
    dots = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    lse_row = tl.load(lse + (pid // tiles).to(tl.int64) * seq_q + rows, mask=rows < seq_q, other=-float("inf"))
    lse_row = tl.where(lse_row == -float("inf"), float("inf"), lse_row * 1.4426950408889634)
    out = (pid // tiles).to(tl.int64) * rows_padded + rows
    tl.store(lse2 + out, lse_row, mask=rows < rows_padded)
    tl.store(delta + out, dots, mask=rows < rows_padded)


@triton.jit(do_not_specialize=["heads_kv", "group", "seq_q", "seq_kv", "rows_padded", "left", "right"])
def gradients_kv(
    q, k, v, do, lse2, delta, dk, dv, slopes, q_turned, do_turned,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_sb, stride_sh,
    heads_kv, group, seq_q, seq_kv, rows_padded, head_dim, left, right, scale, cap, dscale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    UNEVEN: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, PARTS: tl.constexpr, RESIDENT: tl.constexpr, TURNED: tl.constexpr, CHUNKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ONE_LOOP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv[j] = sum_i p[i,j] do[i] and dk[j] = sum_i ds[i,j] q[i], BLOCK_N keys of one head, all its query heads.

    DK and DV say which of them: where both accumulators do not fit into the registers, two launches are faster.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(seq_kv, BLOCK_N)
    tile = pid % tiles  # with a causal mask the first keys are seen by the most rows, and start first
    batch = pid // tiles // heads_kv
    head_kv = pid // tiles % heads_kv
    start_n = tile * BLOCK_N
    offset = seq_kv - seq_q
    j = start_n + tl.arange(0, BLOCK_N)

    # Rows [lo, hi) see some key of the tile, rows [full_lo, full_hi) every one. Keys past seq_kv need no
    # mask: what they gather stays in rows of dk and dv that are not stored.
    last = tl.minimum(start_n + BLOCK_N, seq_kv) - 1
    lo = 0
    hi = seq_q
    full_lo = 0
    full_hi = tl.cdiv(seq_q, BLOCK_M) * BLOCK_M  # rows past seq_q have lse2 = +inf
    if RIGHT:
        lo = tl.maximum(start_n - offset - right, 0) // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(last - offset - right, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        hi = tl.minimum(hi, tl.maximum(last + left - offset + 1, 0))
        full_hi = tl.maximum(start_n + left - offset + 1, 0) // BLOCK_M * BLOCK_M
    if RIGHT:
        full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    full_hi = tl.maximum(full_lo, tl.minimum(full_hi, tl.cdiv(hi, BLOCK_M) * BLOCK_M))

    k_head = head_of(k, batch, head_kv, stride_kb, stride_kh, TMA)
    v_head = head_of(v, batch, head_kv, stride_vb, stride_vh, TMA)
    k_tile = load_own(k_head, batch, head_kv, start_n, seq_kv, stride_kn, head_dim, BLOCK_N, BLOCK_D, PAD_D, TMA, WIDE, PARTS, RESIDENT)  # fmt: skip
    v_tile, dk_acc, dv_acc = 0.0, 0.0, 0.0
    if DK:
        v_tile = load_own(v_head, batch, head_kv, start_n, seq_kv, stride_vn, head_dim, BLOCK_N, BLOCK_D, PAD_D, TMA, WIDE, PARTS, RESIDENT)  # fmt: skip
        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if DV:
        dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):  # the query heads that share this key head, in one fixed order
        head = head_kv * group + member
        q_head = head_of(q, batch, head, stride_qb, stride_qh, TMA)
        g_head = head_of(do, batch, head, stride_gb, stride_gh, TMA)
        row = batch * heads_kv * group + head
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + batch * stride_sb + head * stride_sh) * 1.4426950408889634
        if ONE_LOOP or not (LEFT or RIGHT):
            dk_acc, dv_acc = gather_kv(
                dk_acc, dv_acc, k_tile, v_tile, k_head, v_head, start_n, stride_kn, stride_vn, q_head, g_head, q_turned, do_turned, lse2, delta, batch, head, row, rows_padded,
                lo, hi, full_lo, full_hi, j, offset, seq_q, seq_kv, head_dim, stride_qm, stride_gm, left, right, scale, cap,
                slope, EDGES if LEFT or RIGHT else NONE, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, DK, DV, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
        else:
            if RIGHT:
                dk_acc, dv_acc = gather_kv(
                    dk_acc, dv_acc, k_tile, v_tile, k_head, v_head, start_n, stride_kn, stride_vn, q_head, g_head, q_turned, do_turned, lse2, delta, batch, head, row, rows_padded,
                    lo, full_lo, full_lo, full_hi, j, offset, seq_q, seq_kv, head_dim, stride_qm, stride_gm, left, right, scale, cap,
                    slope, ALL, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, DK, DV, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
            dk_acc, dv_acc = gather_kv(
                dk_acc, dv_acc, k_tile, v_tile, k_head, v_head, start_n, stride_kn, stride_vn, q_head, g_head, q_turned, do_turned, lse2, delta, batch, head, row, rows_padded,
                full_lo, full_hi, full_lo, full_hi, j, offset, seq_q, seq_kv, head_dim, stride_qm, stride_gm, left, right, scale, cap,
                slope, NONE, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, DK, DV, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
            if LEFT:
                dk_acc, dv_acc = gather_kv(
                    dk_acc, dv_acc, k_tile, v_tile, k_head, v_head, start_n, stride_kn, stride_vn, q_head, g_head, q_turned, do_turned, lse2, delta, batch, head, row, rows_padded,
                    full_hi, hi, full_lo, full_hi, j, offset, seq_q, seq_kv, head_dim, stride_qm, stride_gm, left, right, scale, cap,
                    slope, ALL, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, DK, DV, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip

    dk_head = head_of(dk, batch, head_kv, stride_dkb, stride_dkh, False)
    dv_head = head_of(dv, batch, head_kv, stride_dvb, stride_dvh, False)
    if DV:
        store_tile(dv_head, dv_acc, start_n, seq_kv, stride_dvn, head_dim, BLOCK_N, BLOCK_D, PAD_D, WIDE)
    if DK:
        store_tile(dk_head, dk_acc * dscale, start_n, seq_kv, stride_dkn, head_dim, BLOCK_N, BLOCK_D, PAD_D, WIDE)


@triton.jit
def gather_kv(
    dk_acc, dv_acc, k_tile, v_tile, k_head, v_head, start_n, stride_kn, stride_vn, q_head, g_head, q_turned, do_turned, lse2, delta, batch, head, row, rows_padded,
    lo, hi, full_lo, full_hi, j, offset, seq_q, seq_kv, head_dim, stride_qm, stride_gm, left, right, scale, cap, slope,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    UNEVEN: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    PARTS: tl.constexpr, TURNED: tl.constexpr, CHUNKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What query rows [lo, hi) add to dk (without the scale) and dv, on transposed tiles; those inside
    [full_lo, full_hi) need no mask."""
    for start_m in tl.range(lo, hi, BLOCK_M, num_stages=STAGES):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        i = start_m + tl.arange(0, BLOCK_M) + offset
        q_tile = load_tile(q_head, batch, head, start_m, seq_q, stride_qm, head_dim, BLOCK_M, BLOCK_D, PAD_D, UNEVEN, TMA, WIDE, PARTS)  # fmt: skip
        lse_row = load_rows(lse2, row, start_m, rows_padded, BLOCK_M, TMA)
        if CHUNKED:
            s = dot_in_chunks(k_head, start_n, seq_kv, stride_kn, q_head, start_m, seq_q, stride_qm, head_dim, BLOCK_N, BLOCK_M, BLOCK_D, PAD_D, True, UNEVEN, WIDE)  # fmt: skip
        else:
            s = dot(k_tile, turn(q_tile, PARTS), None, PRECISION, PARTS)  # [BLOCK_N, BLOCK_M]
        s, t = logits(s, i[None, :], j[:, None], scale, cap, slope, SOFTCAP, ALIBI)
        p = tl.exp2(s - lse_row[None, :])
        if MASK == ALL:
            p = tl.where(visible(i[None, :], j[:, None], seq_kv, left, right, LEFT, RIGHT, False), p, 0.0)
        elif MASK == EDGES:
            if (start_m < full_lo) | (start_m >= full_hi):
                p = tl.where(visible(i[None, :], j[:, None], seq_kv, left, right, LEFT, RIGHT, False), p, 0.0)
        if DV:  # before do is waited for, where it may run beside the exponentials
            weights = operand(p, k_tile, PARTS, TURNED)
        g_tile = load_tile(g_head, batch, head, start_m, seq_q, stride_gm, head_dim, BLOCK_M, BLOCK_D, PAD_D, UNEVEN, TMA, WIDE, PARTS)  # fmt: skip
        if DV:
            g_rows = load_turned(do_turned, batch, head, start_m, BLOCK_M, BLOCK_D) if TURNED else g_tile
            dv_acc = dot(weights, g_rows, dv_acc, PRECISION, PARTS)  # [BLOCK_N, BLOCK_D]
        if DK:
            delta_row = load_rows(delta, row, start_m, rows_padded, BLOCK_M, TMA)
            if CHUNKED:
                dp = dot_in_chunks(v_head, start_n, seq_kv, stride_vn, g_head, start_m, seq_q, stride_gm, head_dim, BLOCK_N, BLOCK_M, BLOCK_D, PAD_D, True, UNEVEN, WIDE)  # fmt: skip
            else:
                dp = dot(v_tile, turn(g_tile, PARTS), None, PRECISION, PARTS)  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - delta_row[None, :])
            if SOFTCAP:
                ds = ds * (1.0 - t * t)
            ds = operand(ds, k_tile, PARTS, TURNED)
            q_rows = load_turned(q_turned, batch, head, start_m, BLOCK_M, BLOCK_D) if TURNED else q_tile
            dk_acc = dot(ds, q_rows, dk_acc, PRECISION, PARTS)  # [BLOCK_N, BLOCK_D]
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=["heads", "group", "seq_q", "seq_kv", "rows_padded", "left", "right"])
def gradients_q(
    q, k, v, do, lse2, delta, dq, slopes, k_turned,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dqb, stride_dqh, stride_dqm, stride_sb, stride_sh,
    heads, group, seq_q, seq_kv, rows_padded, head_dim, left, right, scale, cap, dscale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, TAIL: tl.constexpr,
    UNEVEN: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, PARTS: tl.constexpr, RESIDENT: tl.constexpr, TURNED: tl.constexpr, CHUNKED: tl.constexpr, ONE_LOOP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq[i] = sum_j ds[i,j] k[j], BLOCK_M rows of one head."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(seq_q, BLOCK_M)
    tile = pid % tiles
    if RIGHT:
        tile = tiles - 1 - tile  # the longest rows start first
    batch = pid // tiles // heads
    head = pid // tiles % heads
    start_m = tile * BLOCK_M
    offset = seq_kv - seq_q
    i = start_m + tl.arange(0, BLOCK_M) + offset
    lo, full_lo, full_hi, hi = key_range(start_m, offset, seq_q, seq_kv, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * stride_sb + head * stride_sh) * 1.4426950408889634
    q_head = head_of(q, batch, head, stride_qb, stride_qh, TMA)
    g_head = head_of(do, batch, head, stride_gb, stride_gh, TMA)
    k_head = head_of(k, batch, head // group, stride_kb, stride_kh, TMA)
    v_head = head_of(v, batch, head // group, stride_vb, stride_vh, TMA)
    q_tile = load_own(q_head, batch, head, start_m, seq_q, stride_qm, head_dim, BLOCK_M, BLOCK_D, PAD_D, TMA, WIDE, PARTS, RESIDENT)  # fmt: skip
    g_tile = load_own(g_head, batch, head, start_m, seq_q, stride_gm, head_dim, BLOCK_M, BLOCK_D, PAD_D, TMA, WIDE, PARTS, RESIDENT)  # fmt: skip
    lse_row = load_rows(lse2, pid // tiles, start_m, rows_padded, BLOCK_M, TMA)
    delta_row = load_rows(delta, pid // tiles, start_m, rows_padded, BLOCK_M, TMA)
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    EDGE: tl.constexpr = LEFT or RIGHT or TAIL
    if ONE_LOOP or not EDGE:
        dq_acc = gather_q(
            dq_acc, q_tile, g_tile, q_head, g_head, start_m, seq_q, stride_qm, stride_gm, lse_row, delta_row, k_head, v_head, k_turned, batch, head // group, lo, hi,
            full_lo, full_hi, i, seq_kv, head_dim, stride_kn, stride_vn, left, right, scale, cap, slope,
            EDGES if EDGE else NONE, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
    else:
        if LEFT:
            dq_acc = gather_q(
                dq_acc, q_tile, g_tile, q_head, g_head, start_m, seq_q, stride_qm, stride_gm, lse_row, delta_row, k_head, v_head, k_turned, batch, head // group, lo, full_lo,
                full_lo, full_hi, i, seq_kv, head_dim, stride_kn, stride_vn, left, right, scale, cap, slope,
                ALL, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
        dq_acc = gather_q(
            dq_acc, q_tile, g_tile, q_head, g_head, start_m, seq_q, stride_qm, stride_gm, lse_row, delta_row, k_head, v_head, k_turned, batch, head // group, full_lo, full_hi,
            full_lo, full_hi, i, seq_kv, head_dim, stride_kn, stride_vn, left, right, scale, cap, slope,
            NONE, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
        if RIGHT or TAIL:
            dq_acc = gather_q(
                dq_acc, q_tile, g_tile, q_head, g_head, start_m, seq_q, stride_qm, stride_gm, lse_row, delta_row, k_head, v_head, k_turned, batch, head // group, full_hi, hi,
                full_lo, full_hi, i, seq_kv, head_dim, stride_kn, stride_vn, left, right, scale, cap, slope,
                ALL, LEFT, RIGHT, SOFTCAP, ALIBI, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
    dq_head = head_of(dq, batch, head, stride_dqb, stride_dqh, False)
    store_tile(dq_head, dq_acc * dscale, start_m, seq_q, stride_dqm, head_dim, BLOCK_M, BLOCK_D, PAD_D, WIDE)


@triton.jit
def gather_q(
    dq_acc, q_tile, g_tile, q_head, g_head, start_m, seq_q, stride_qm, stride_gm, lse_row, delta_row, k_head, v_head, k_turned, batch, head_kv, lo, hi,
    full_lo, full_hi, i, seq_kv, head_dim, stride_kn, stride_vn, left, right, scale, cap, slope,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, PARTS: tl.constexpr, TURNED: tl.constexpr, CHUNKED: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What keys [lo, hi) add to dq (without the scale); those inside [full_lo, full_hi) need no mask."""
    LOAD_TAIL: tl.constexpr = UNEVEN and MASK != NONE
    for start_n in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        j = start_n + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, batch, head_kv, start_n, seq_kv, stride_kn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
        v_tile = load_tile(v_head, batch, head_kv, start_n, seq_kv, stride_vn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
        if CHUNKED:
            s = dot_in_chunks(q_head, start_m, seq_q, stride_qm, k_head, start_n, seq_kv, stride_kn, head_dim, BLOCK_M, BLOCK_N, BLOCK_D, PAD_D, True, LOAD_TAIL, WIDE)  # fmt: skip
            dp = dot_in_chunks(g_head, start_m, seq_q, stride_gm, v_head, start_n, seq_kv, stride_vn, head_dim, BLOCK_M, BLOCK_N, BLOCK_D, PAD_D, True, LOAD_TAIL, WIDE)  # fmt: skip
        else:
            s = dot(q_tile, turn(k_tile, PARTS), None, PRECISION, PARTS)  # [BLOCK_M, BLOCK_N]
            dp = dot(g_tile, turn(v_tile, PARTS), None, PRECISION, PARTS)  # [BLOCK_M, BLOCK_N]
        s, t = logits(s, i[:, None], j[None, :], scale, cap, slope, SOFTCAP, ALIBI)
        p = tl.exp2(s - lse_row[:, None])
        ds = p * (dp - delta_row[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        if MASK == ALL:  # p of a hidden key may be inf, and its dp inf or nan
            ds = tl.where(visible(i[:, None], j[None, :], seq_kv, left, right, LEFT, RIGHT, TAIL), ds, 0.0)
        elif MASK == EDGES:
            if (start_n < full_lo) | (start_n >= full_hi):
                ds = tl.where(visible(i[:, None], j[None, :], seq_kv, left, right, LEFT, RIGHT, TAIL), ds, 0.0)
        ds = operand(ds, q_tile, PARTS, TURNED)
        k_rows = load_turned(k_turned, batch, head_kv, start_n, BLOCK_N, BLOCK_D) if TURNED else k_tile
        dq_acc = dot(ds, k_rows, dq_acc, PRECISION, PARTS)  # [BLOCK_M, BLOCK_D]
    return dq_acc
