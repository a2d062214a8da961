"""The forward kernel: FlashAttention-2 (Dao 2023), algorithm 1, one program per tile of query rows."""

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
    load_tile,
    load_turned,
    logits,
    operand,
    store_tile,
    turn,
    visible,
)


@triton.jit(do_not_specialize=["heads", "group", "seq_q", "seq_kv", "left", "right"])
def attention_forward(
    q, k, v, o, lse, slopes,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_sb, stride_sh,
    heads, group, seq_q, seq_kv, head_dim, left, right, scale, cap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    FOLD: tl.constexpr, NEGATE: tl.constexpr, UNEVEN: tl.constexpr, TAIL: tl.constexpr,
    PAD_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, PARTS: tl.constexpr, RESIDENT: tl.constexpr, TURNED: tl.constexpr,
    CHUNKED: tl.constexpr, WS: tl.constexpr, ONE_LOOP: tl.constexpr, LATE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o[i] = sum_j softmax_j(logits(q[i].k[j])) v[j] and lse[i] (natural log), BLOCK_M rows of one head."""
    pid = tl.program_id(0)  # tiles of one head are neighbours, so that its k and v stay in L2
    tiles = tl.cdiv(seq_q, BLOCK_M)
    tile = pid % tiles
    if RIGHT:
        tile = tiles - 1 - tile  # the longest rows start first and the short ones fill the end
    batch = pid // tiles // heads
    head = pid // tiles % heads
    start_m = tile * BLOCK_M
    offset = seq_kv - seq_q  # bottom-right: row i sees keys up to i + offset (flash-attention >= 2.1)
    rows = start_m + tl.arange(0, BLOCK_M)
    i = rows + offset

    lo, full_lo, full_hi, hi = key_range(start_m, offset, seq_q, seq_kv, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * stride_sb + head * stride_sh) * 1.4426950408889634
    q_head = head_of(q, batch, head, stride_qb, stride_qh, TMA)
    k_head = head_of(k, batch, head // group, stride_kb, stride_kh, TMA)
    v_head = head_of(v, batch, head // group, stride_vb, stride_vh, TMA)
    q_tile = load_own(q_head, batch, head, start_m, seq_q, stride_qm, head_dim, BLOCK_M, BLOCK_D, PAD_D, TMA, WIDE, PARTS, RESIDENT)  # fmt: skip

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    EDGE: tl.constexpr = LEFT or RIGHT or TAIL
    # Warps are not specialised in a loop that branches, so there every tile is masked.
    MASK: tl.constexpr = (ALL if WS else EDGES) if EDGE else NONE
    if ONE_LOOP or WS or not EDGE:
        if TURNED:  # where this loop may be empty, ptxas puts a wait behind every wgmma: rows without keys get one tile
            hi = tl.maximum(hi, lo + 1)
            tl.assume(lo < hi)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q_tile, q_head, start_m, seq_q, stride_qm, k_head, v_head, batch, head // group, lo, hi, full_lo, full_hi, i, seq_kv,
            head_dim, stride_kn, stride_vn, left, right, scale, cap, slope, MASK, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD,
            NEGATE, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, WS, LATE, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
    else:
        if LEFT:
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q_tile, q_head, start_m, seq_q, stride_qm, k_head, v_head, batch, head // group, lo, full_lo, full_lo, full_hi, i, seq_kv,
                head_dim, stride_kn, stride_vn, left, right, scale, cap, slope, ALL, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD,
                NEGATE, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, False, LATE, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q_tile, q_head, start_m, seq_q, stride_qm, k_head, v_head, batch, head // group, full_lo, full_hi, full_lo, full_hi, i, seq_kv,
            head_dim, stride_kn, stride_vn, left, right, scale, cap, slope, NONE, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD,
            NEGATE, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, False, LATE, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
        if RIGHT or TAIL:
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q_tile, q_head, start_m, seq_q, stride_qm, k_head, v_head, batch, head // group, full_hi, hi, full_lo, full_hi, i, seq_kv,
                head_dim, stride_kn, stride_vn, left, right, scale, cap, slope, ALL, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD,
                NEGATE, UNEVEN, TAIL, PAD_D, WIDE, PRECISION, TMA, PARTS, TURNED, CHUNKED, False, LATE, STAGES, BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)  # a row that saw no key: o = 0, and lse = m_i = -inf
    acc = acc * (1.0 / l_safe)[:, None]
    o_head = head_of(o, batch, head, stride_ob, stride_oh, False)
    store_tile(o_head, acc, start_m, seq_q, stride_om, head_dim, BLOCK_M, BLOCK_D, PAD_D, WIDE)
    lse_rows = lse + (pid // tiles).to(tl.int64) * seq_q + rows
    tl.store(lse_rows, (m_i + tl.log2(l_safe)) * 0.6931471805599453, mask=rows < seq_q)


@triton.jit
def attend(
    acc, l_i, m_i, q_tile, q_head, start_m, seq_q, stride_qm, k_head, v_head, batch, head_kv, lo, hi, full_lo, full_hi, i, seq_kv,
    head_dim, stride_kn, stride_vn, left, right, scale, cap, slope,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    FOLD: tl.constexpr, NEGATE: tl.constexpr, UNEVEN: tl.constexpr, TAIL: tl.constexpr,
    PAD_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, PARTS: tl.constexpr, TURNED: tl.constexpr,
    CHUNKED: tl.constexpr, WS: tl.constexpr, LATE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [lo, hi), of which the tiles inside [full_lo, full_hi) need no mask.

    With LATE the next tile's q.k is computed before this tile's p.v, so that p.v runs on the tensor cores
    while the next softmax runs beside them (FlashAttention-3, section 3.2, as far as the compiler's waits allow).
    """
    LOAD_TAIL: tl.constexpr = UNEVEN and MASK != NONE
    if LATE:
        if lo < hi:
            last = lo + (hi - lo - 1) // BLOCK_N * BLOCK_N
            k_tile = load_tile(k_head, batch, head_kv, lo, seq_kv, stride_kn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
            s = dot(q_tile, turn(k_tile, PARTS), None, PRECISION, PARTS)  # [BLOCK_M, BLOCK_N]
            for start_n in tl.range(lo, last, BLOCK_N, num_stages=STAGES):
                start_n = tl.multiple_of(start_n, BLOCK_N)
                p, alpha, l_i, m_i = online_softmax(s, l_i, m_i, start_n, full_lo, full_hi, i, seq_kv, left, right, scale, cap, slope, MASK, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD, NEGATE, TAIL, BLOCK_N)  # fmt: skip
                k_tile = load_tile(k_head, batch, head_kv, start_n + BLOCK_N, seq_kv, stride_kn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
                s = dot(q_tile, turn(k_tile, PARTS), None, PRECISION, PARTS)
                if TURNED:
                    v_tile = load_turned(v_head, batch, head_kv, start_n, BLOCK_N, BLOCK_D)
                else:
                    v_tile = load_tile(v_head, batch, head_kv, start_n, seq_kv, stride_vn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
                # Only after acc was waited for: until then the tensor cores may still read the last p from the registers
                # of its operand, where this one would go.  tests/compile/test_races.py
                acc = acc * alpha[:, None]
                acc = dot(operand(p, q_tile, PARTS, TURNED), v_tile, acc, PRECISION, PARTS)  # [BLOCK_M, BLOCK_D]
            p, alpha, l_i, m_i = online_softmax(s, l_i, m_i, last, full_lo, full_hi, i, seq_kv, left, right, scale, cap, slope, MASK, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD, NEGATE, TAIL, BLOCK_N)  # fmt: skip
            if TURNED:
                v_tile = load_turned(v_head, batch, head_kv, last, BLOCK_N, BLOCK_D)
            else:
                v_tile = load_tile(v_head, batch, head_kv, last, seq_kv, stride_vn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
            acc = dot(operand(p, q_tile, PARTS, TURNED), v_tile, acc * alpha[:, None], PRECISION, PARTS)
    else:
        for start_n in tl.range(lo, hi, BLOCK_N, num_stages=STAGES, warp_specialize=WS):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            if CHUNKED:
                s = dot_in_chunks(q_head, start_m, seq_q, stride_qm, k_head, start_n, seq_kv, stride_kn, head_dim, BLOCK_M, BLOCK_N, BLOCK_D, PAD_D, True, LOAD_TAIL, WIDE)  # fmt: skip
            else:
                k_tile = load_tile(k_head, batch, head_kv, start_n, seq_kv, stride_kn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
                s = dot(q_tile, turn(k_tile, PARTS), None, PRECISION, PARTS)  # [BLOCK_M, BLOCK_N]
            p, alpha, l_i, m_i = online_softmax(s, l_i, m_i, start_n, full_lo, full_hi, i, seq_kv, left, right, scale, cap, slope, MASK, LEFT, RIGHT, SOFTCAP, ALIBI, FOLD, NEGATE, TAIL, BLOCK_N)  # fmt: skip
            # Before v is waited for, where it may run beside the exponentials: the compiler moves nothing over a wait.
            acc = acc * alpha[:, None]
            p = operand(p, q_tile, PARTS, TURNED)
            if TURNED:
                v_tile = load_turned(v_head, batch, head_kv, start_n, BLOCK_N, BLOCK_D)
            else:
                v_tile = load_tile(v_head, batch, head_kv, start_n, seq_kv, stride_vn, head_dim, BLOCK_N, BLOCK_D, PAD_D, LOAD_TAIL, TMA, WIDE, PARTS)  # fmt: skip
            acc = dot(p, v_tile, acc, PRECISION, PARTS)  # [BLOCK_M, BLOCK_D]
    return acc, l_i, m_i


@triton.jit
def online_softmax(
    s, l_i, m_i, start_n, full_lo, full_hi, i, seq_kv, left, right, scale, cap, slope,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    FOLD: tl.constexpr, NEGATE: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(p, alpha, l_i, m_i): the weights of one tile of products s, and what the rows' earlier sums shrink by."""
    j = start_n + tl.arange(0, BLOCK_N)
    if NEGATE:
        s = -s
    if not FOLD:
        s, _ = logits(s, i[:, None], j[None, :], scale, cap, slope, SOFTCAP, ALIBI)
    if MASK == ALL:
        s = tl.where(visible(i[:, None], j[None, :], seq_kv, left, right, LEFT, RIGHT, TAIL), s, -float("inf"))
    elif MASK == EDGES:
        if (start_n < full_lo) | (start_n >= full_hi):
            s = tl.where(visible(i[:, None], j[None, :], seq_kv, left, right, LEFT, RIGHT, TAIL), s, -float("inf"))
    # One formula for masked and full tiles, so that a row's result does not depend on where tiles fall.
    if FOLD:  # scale > 0 commutes with max: one fma per logit
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that saw no key yet stays finite
        p = tl.exp2(s * scale - m_safe[:, None])
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return p, alpha, l_i * alpha + tl.sum(p, 1), m_new
