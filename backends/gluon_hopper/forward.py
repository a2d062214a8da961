"""The forward kernel for Hopper: FlashAttention-2 (Dao 2023), algorithm 1, warp-specialised as FlashAttention-3 (Shah et
al. 2024) does it. docs/gluon-pipeline.md draws who waits for whom.

A block of threads is one producer partition, which moves tiles by TMA, and two or three consumer partitions
("groups") of 64 query rows each. Blocks are persistent: each walks over several row tiles, and the rings of K, V and Q
run on from one to the next. Tensors are (batch, heads, seq, head_dim); descriptors fill what lies past their end, or
before key 0, with zeros and do not store it.

Keys are counted from the start of key tile 0, which lies `pad` keys before the first key, so that the causal edge of
every group falls on one key tile, whatever the lengths: that tile comes first (keys go from right to left) and is the
only one with a mask, but for the tiles at the left edge of a window. Logits live in the log2 domain.

Used of Gluon: shared memory (index, reshape, permute, load, store), mbarrier (init, expect, wait), TMA load and store,
warpgroup_mma with A in shared memory or registers, sum, max, maximum, minimum, exp2, log2, where, arange, zeros, load,
store, convert_layout, reshape, thread barrier, warp_specialize, and inline assembly for named barriers.
"""

from flash2.backends.gluon_hopper.compat import (
    FIRST_BARRIER,
    fence_async_shared,
    gl,
    gluon,
    group_barrier,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# ---- named barriers: a buffer is free again, a group may use the tensor cores
#
# A named barrier has one open phase: whoever arrives twice before the other side has synchronised once corrupts it.
# So every ring slot has an id of its own. mbarrier.arrive would do as well, but ptxas then moves the wait for P V above
# the exponentials, and with it goes the overlap of the two.


@gluon.constexpr_function
def _bar(op, threads):
    return f"bar.{op} $1, {threads}; mov.b32 $0, 0;"


@gluon.constexpr_function
def _bar_arrive_after(threads):
    return (
        "{ .reg .b32 t, u; shr.u32 t, $2, 31; shr.u32 u, $3, 31; or.b32 t, t, u; add.u32 t, t, $4; "
        f"bar.arrive t, {threads}; mov.b32 $0, 0; mov.b32 $1, 0; }}"
    )


@gluon.jit
def bar_sync(id, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(_bar("sync", THREADS), "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_arrive(id, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(_bar("arrive", THREADS), "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_arrive_after(x, id, THREADS: gl.constexpr):
    """bar_arrive behind x, two floats >= 0 a thread, whose sign bits enter the id: an order that ptxas cannot undo."""
    gl.inline_asm_elementwise(
        _bar_arrive_after(THREADS), "=r,=r,r,r,r,r", [x, id], dtype=gl.int32, is_pure=False, pack=2
    )


@gluon.constexpr_function
def k_free(slots):
    return FIRST_BARRIER.value


@gluon.constexpr_function
def v_free(slots):
    return FIRST_BARRIER.value + slots


@gluon.constexpr_function
def q_free(slots):
    return FIRST_BARRIER.value + 2 * slots


@gluon.constexpr_function
def turn_of(group, SHAPE):
    """The barrier at which `group` waits for its turn at the tensor cores."""
    groups, _block_n, _block_d, kv_slots, q_slots = (getattr(size, "value", size) for size in SHAPE)
    return FIRST_BARRIER.value + 2 * kv_slots + max(q_slots, 1) + group % groups


@gluon.jit
def ring(g, SLOTS: gl.constexpr):
    """(slot, mbarrier parity) of the g-th tile that goes through a ring."""
    return g % SLOTS, (g // SLOTS) & 1


# ---- tile scheduler: which row tiles, in which order, and which keys each sees


@gluon.jit
def planned_count(table, rounds):
    """How many tiles a table of schedule.plan() gives this block."""
    return gl.load(table + rounds * gl.num_programs(0) + gl.program_id(0))


@gluon.jit
def planned_tile(table, r):
    """(tile, row) that it gives this block in round r."""
    entry = gl.load(table + r * gl.num_programs(0) + gl.program_id(0))
    return entry & 4095, entry >> 12


@gluon.jit
def tile_count(order, PLANNED: gl.constexpr):
    """How many row tiles this block computes."""
    table, table_rounds, row_tiles, rows = order
    blocks = gl.num_programs(0)
    block = gl.program_id(0)
    if PLANNED:
        return planned_count(table, table_rounds)
    else:
        full_rounds = row_tiles * rows // blocks
        place = gl.where((full_rounds & 1) == 1, blocks - 1 - block, block)
        return full_rounds + gl.where(place < row_tiles * rows - full_rounds * blocks, 1, 0)


@gluon.jit
def tile_at(r, order, RIGHT: gl.constexpr, PLANNED: gl.constexpr):
    """(row tile, batch * heads + head) of this block's round r: as planned (schedule.py), or a snake over the blocks."""
    table, _table_rounds, row_tiles, rows = order
    blocks = gl.num_programs(0)
    block = gl.program_id(0)
    if PLANNED:
        return planned_tile(table, r)
    else:
        t = r * blocks + gl.where((r & 1) == 1, blocks - 1 - block, block)
        if RIGHT:  # the longest rows first: the snake pairs them with the short ones
            return row_tiles - 1 - t // rows, t % rows
        else:
            return t % row_tiles, t // row_tiles


@gluon.jit
def key_tiles(row0, ROWS: gl.constexpr, band, BN: gl.constexpr, MASKS: gl.constexpr):
    """(end, n): query rows row0.. see keys in the n tiles [end - n, end)."""
    seq_q, keys, pad, diagonal, leftmost = band
    LEFT, RIGHT, _tail = MASKS
    last = gl.minimum(row0 + ROWS, seq_q) - 1
    hi = keys
    if RIGHT:
        hi = gl.minimum(hi, last + diagonal)
    end = (hi + BN - 1) // BN
    n = end
    if LEFT:
        lo = gl.maximum(pad, row0 + leftmost)
        n = gl.where(hi > lo, end - lo // BN, 0)
    return end, gl.where((row0 < seq_q) & (hi > 0), n, 0)


# ---- producer


@gluon.jit
def load_q(r, row, start_m, q_desc, q_s, q_full, heads, SHAPE: gl.constexpr):
    """Begin to load the query rows of every group, each by its own barrier, when their buffer is free."""
    GROUPS, _bn, D, _kv_slots, Q_SLOTS = SHAPE
    SLOTS: gl.constexpr = max(Q_SLOTS, 1)
    slot = r % SLOTS
    if r >= SLOTS:
        bar_sync(slot + q_free(SHAPE[3]), 128 * (GROUPS + 1))
    for c in gl.static_range(GROUPS):
        full = q_full.index(slot * GROUPS + c)
        mbarrier.expect(full, q_desc.block_type.nbytes)
        tile = q_s.index(slot * GROUPS + c).reshape([1, 1, 64, D])
        tma_load(q_desc, [row // heads, row % heads, start_m + c * 64, 0], full, tile)


@gluon.jit
def producer(
    descs, tiles, fulls, order, heads, band,
    SHAPE: gl.constexpr, MASKS: gl.constexpr, PLANNED: gl.constexpr,
):  # fmt: skip
    """Partition 0: every tile of Q, K and V of this block's row tiles, as soon as its buffer is free."""
    q_desc, k_desc, v_desc = descs
    q_s, k_s, v_s = tiles
    q_full, k_full, v_full = fulls
    heads_q, group, batch_group = heads
    pad = band[2]
    GROUPS, BN, D, KV_SLOTS, _q_slots = SHAPE
    BM: gl.constexpr = 64 * GROUPS
    THREADS: gl.constexpr = 128 * (GROUPS + 1)
    count = tile_count(order, PLANNED)
    g = 0
    m, row = tile_at(0, order, MASKS[1], PLANNED)
    for r in range(count):
        m_next, row_next = tile_at(gl.minimum(r + 1, count - 1), order, MASKS[1], PLANNED)  # read one tile ahead
        batch = row // heads_q // batch_group
        head = row % heads_q // group
        end, n = key_tiles(m * BM, BM, band, BN, MASKS)
        if (MASKS[0] or MASKS[1]) and n == 0:
            load_q(r, row, m * BM, q_desc, q_s, q_full, heads_q, SHAPE)  # not read: keeps the ring in step
        for i in range(n):
            slot = g % KV_SLOTS
            start_n = (end - 1 - i) * BN - pad
            if g >= KV_SLOTS:
                bar_sync(slot + k_free(KV_SLOTS), THREADS)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head, start_n, 0], k_full.index(slot), k_s.index(slot).reshape([1, 1, BN, D]))
            if i == 0:  # K first: Q may have to wait for the consumers
                load_q(r, row, m * BM, q_desc, q_s, q_full, heads_q, SHAPE)
            if g >= KV_SLOTS:
                bar_sync(slot + v_free(KV_SLOTS), THREADS)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma_load(v_desc, [batch, head, start_n, 0], v_full.index(slot), v_s.index(slot).reshape([1, 1, BN, D]))
            g += 1
        m = m_next
        row = row_next


# ---- mask


@gluon.jit
def masked(s, row0, start_n, band, MASKS: gl.constexpr):
    """s [64, BN] with -inf where query row0 + i does not see key start_n + j."""
    _seq_q, keys, pad, diagonal, leftmost = band
    LEFT, RIGHT, TAIL = MASKS
    i = row0 + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))
    j = start_n + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    if RIGHT:
        hi = i + diagonal
        if TAIL:
            hi = gl.minimum(hi, keys)
        s = gl.where(j[None, :] < hi[:, None], s, -float("inf"))
    elif TAIL:
        s = gl.where(j[None, :] < keys, s, -float("inf"))
    if LEFT:
        lo = gl.maximum(i + leftmost, pad)
        s = gl.where(j[None, :] >= lo[:, None], s, -float("inf"))
    return s


# ---- softmax


@gluon.jit
def logits(s, scales, MATHS: gl.constexpr):
    """Products q.k as the softmax takes them: still to be scaled if FOLD, else logits in the log2 domain."""
    FOLD, NEGATE, SOFTCAP = MATHS
    scale, cap = scales
    if SOFTCAP:  # cap * tanh(x) = cap - 2 cap / (1 + exp(2x)); scale has the 2 log2(e), cap the log2(e)
        s = cap - 2.0 * cap / (1.0 + gl.exp2(s * scale))
    elif not FOLD:
        s = s * scale
    elif NEGATE:
        s = -s
    return s


@gluon.jit
def row_max(s, scales, MATHS: gl.constexpr):
    """The largest logit of each row. A scale > 0 commutes with max."""
    FOLD, _negate, _softcap = MATHS
    if FOLD:
        return gl.max(s, 1) * scales[0]
    else:
        return gl.max(s, 1)


@gluon.jit
def weights(s, m_i, scales, MATHS: gl.constexpr):
    """exp2(logit - m_i); with FOLD one fma and one ex2 each."""
    FOLD, _negate, _softcap = MATHS
    if FOLD:
        return gl.exp2(s * scales[0] - m_i[:, None])
    else:
        return gl.exp2(s - m_i[:, None])


@gluon.jit
def row_sum(p):
    """The sum of each row inside each of its four threads, [64, BN] -> [64, 4]; the rest follows once per row tile."""
    return gl.sum(gl.sum(p.reshape([64, p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.constexpr_function
def _multiply_unless_one(n):
    moves = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return (
        f"{{ .reg .pred t, u; setp.eq.f32 t, ${2 * n}, 0f3F800000; setp.eq.and.f32 t, ${2 * n + 2}, 0f3F800000, t; "
        f"vote.sync.all.pred u, t, 0xffffffff; @u bra done; {moves} done: }}"
    )


@gluon.constexpr_function
def _in_place(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescaled(acc, alpha):
    """acc * alpha; a warp passes over it when the alpha of its 16 rows are all 1."""
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    # A thread holds two rows, which alternate in pairs of elements.
    n: gl.constexpr = min(64, acc.shape[1] // 2)
    alpha, acc = gl.broadcast(alpha, acc)
    return gl.inline_asm_elementwise(
        _multiply_unless_one(n), _in_place(n), [acc, alpha], dtype=gl.float32, is_pure=True, pack=n
    )


@gluon.jit
def raised(m_i, s_max):
    """What to subtract of the logits from now on: what it was, or their largest once that is 2^8 times larger."""
    return gl.where(s_max > m_i + 8.0, s_max, m_i)


@gluon.jit
def rescaled_sum(l_i, alpha, p):
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None]
    return l_i * alpha + row_sum(p)


# ---- consumer


@gluon.jit
def issue_scores(q, k, SHAPE: gl.constexpr, Q_COLUMNS: gl.constexpr):
    """Begin S = Q K^T; q is (its first Q_COLUMNS columns in registers, all of it in shared memory)."""
    _groups, BN, D, _kv_slots, _q_slots = SHAPE
    q_registers, q_tile = q
    zeros = gl.zeros([64, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    if Q_COLUMNS == 0:
        return warpgroup_mma(q_tile, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    elif Q_COLUMNS == D:
        return warpgroup_mma(q_registers, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        left = k.slice(0, Q_COLUMNS, 1).permute((1, 0))
        s = warpgroup_mma(q_registers, left, zeros, use_acc=False, is_async=True)
        rest: gl.constexpr = D - Q_COLUMNS
        right = k.slice(Q_COLUMNS, rest, 1).permute((1, 0))
        return warpgroup_mma(q_tile.slice(Q_COLUMNS, rest, 1), right, s, is_async=True)


@gluon.jit
def skip_tiles(
    count, g, fulls, CID: gl.constexpr, SHAPE: gl.constexpr, TURNS: gl.constexpr
):  # fmt: skip
    """Key tiles that another group needs and this one does not: wait for them, so that phases stay exact, and free them."""
    _q_full, k_full, v_full = fulls
    KV_SLOTS: gl.constexpr = SHAPE[3]
    THREADS: gl.constexpr = 128 * (SHAPE[0] + 1)
    for i in range(count):  # noqa: B007
        slot, phase = ring(g, KV_SLOTS)
        mbarrier.wait(k_full.index(slot), phase)
        bar_arrive(slot + k_free(KV_SLOTS), THREADS)
        if TURNS:
            bar_sync(turn_of(CID, SHAPE), 256)
            bar_arrive(turn_of(CID + 1, SHAPE), 256)
        mbarrier.wait(v_full.index(slot), phase)
        bar_arrive(slot + v_free(KV_SLOTS), THREADS)
        g += 1
    return g


@gluon.jit
def first_tile(
    CID: gl.constexpr, q, g, row0, start_n, k_s, k_full, band, scales,
    SHAPE: gl.constexpr, MASKS: gl.constexpr, MATHS: gl.constexpr, HOW: gl.constexpr,
):  # fmt: skip
    """S = Q K^T of a group's first key tile, the one with the mask: (p in 16 bits, m_i, l_i)."""
    TURNS, _ordered, Q_COLUMNS, _overlap = HOW
    GROUPS, _bn, D, KV_SLOTS, _q_slots = SHAPE
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot, phase = ring(g, KV_SLOTS)
    mbarrier.wait(k_full.index(slot), phase)
    if TURNS:
        bar_sync(turn_of(CID, SHAPE), 256)
    s_done = issue_scores(q, k_s.index(slot), SHAPE, Q_COLUMNS)
    if TURNS:
        bar_arrive(turn_of(CID + 1, SHAPE), 256)
    s = warpgroup_mma_wait(0, deps=[s_done])  # [64, BN]
    bar_arrive(slot + k_free(KV_SLOTS), 128 * (GROUPS + 1))
    s = masked(logits(s, scales, MATHS), row0, start_n, band, MASKS)
    m_i = row_max(s, scales, MATHS)
    if MASKS[0] or MASKS[1]:
        m_i = gl.where(m_i == -float("inf"), -1e30, m_i)  # a row that sees no key: p = 0, l_i = 0, lse = -inf
    p = weights(s, m_i, scales, MATHS)
    l_i = row_sum(p)
    return gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2)), m_i, l_i


@gluon.jit
def next_tile(
    CID: gl.constexpr, q, g, p16, acc, m_i, l_i, row0, start_n, kv, fulls, band, scales, MASKED: gl.constexpr,
    SHAPE: gl.constexpr, MASKS: gl.constexpr, MATHS: gl.constexpr, HOW: gl.constexpr,
):  # fmt: skip
    """S = Q K^T of key tile g beside O += P V of tile g - 1, then the softmax of S beside what is left of it.

    Without OVERLAP P V goes first and the softmax runs beside the other groups' products alone, whose turn begins
    when P V is done, so that there is always one product in the queue.
    """
    TURNS, ORDERED, Q_COLUMNS, OVERLAP = HOW
    GROUPS, _bn, D, KV_SLOTS, _q_slots = SHAPE
    k_s, v_s = kv
    _q_full, k_full, v_full = fulls
    THREADS: gl.constexpr = 128 * (GROUPS + 1)
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot, phase = ring(g, KV_SLOTS)
    v_slot, v_phase = ring(g - 1, KV_SLOTS)
    if OVERLAP:
        mbarrier.wait(k_full.index(slot), phase)
        if TURNS:
            bar_sync(turn_of(CID, SHAPE), 256)
        s_done = issue_scores(q, k_s.index(slot), SHAPE, Q_COLUMNS)
        mbarrier.wait(v_full.index(v_slot), v_phase)
        o_done = warpgroup_mma(p16, v_s.index(v_slot), acc, is_async=True)
        if TURNS:
            bar_arrive(turn_of(CID + 1, SHAPE), 256)
        s = warpgroup_mma_wait(1, deps=[s_done])  # [64, BN]
    else:
        mbarrier.wait(v_full.index(v_slot), v_phase)
        if TURNS:
            bar_sync(turn_of(CID, SHAPE), 256)
        o_done = warpgroup_mma(p16, v_s.index(v_slot), acc, is_async=True)
        mbarrier.wait(k_full.index(slot), phase)
        s_done = issue_scores(q, k_s.index(slot), SHAPE, Q_COLUMNS)
        acc = warpgroup_mma_wait(1, deps=[o_done])  # [64, D]
        bar_arrive(v_slot + v_free(KV_SLOTS), THREADS)
        if TURNS:
            bar_arrive(turn_of(CID + 1, SHAPE), 256)
        s = warpgroup_mma_wait(0, deps=[s_done])  # [64, BN]
    if not ORDERED:
        bar_arrive(slot + k_free(KV_SLOTS), THREADS)
    s = logits(s, scales, MATHS)
    if MASKED:
        s = masked(s, row0, start_n, band, (MASKS[0], False, False))
    m_new = raised(m_i, row_max(s, scales, MATHS))
    p = weights(s, m_new, scales, MATHS)
    alpha = gl.exp2(m_i - m_new)
    l_i = rescaled_sum(l_i, alpha, p)
    if ORDERED:
        bar_arrive_after(l_i, slot + k_free(KV_SLOTS), THREADS)
    if OVERLAP:
        acc = warpgroup_mma_wait(0, deps=[o_done])  # [64, D]
        bar_arrive(v_slot + v_free(KV_SLOTS), THREADS)
    p16 = gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return p16, rescaled(acc, alpha), m_new, l_i


@gluon.jit
def last_product(g, p16, acc, m_i, l_i, v_s, v_full, SHAPE: gl.constexpr, MASKS: gl.constexpr):
    """O += P V of the last key tile, divided by the row sums, beside the logarithm of those: (o, lse)."""
    GROUPS, BN, D, KV_SLOTS, _q_slots = SHAPE
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot, phase = ring(g, KV_SLOTS)
    mbarrier.wait(v_full.index(slot), phase)
    o_done = warpgroup_mma(p16, v_s.index(slot), acc, is_async=True)
    l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S_LAYOUT))
    lse = (m_i + gl.log2(l_i)) * 0.6931471805599453
    if MASKS[0] or MASKS[1]:
        l_i = gl.where(l_i == 0.0, 1.0, l_i)
    inverse = gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, O_LAYOUT))
    acc = warpgroup_mma_wait(0, deps=[o_done])  # [64, D]
    bar_arrive(slot + v_free(KV_SLOTS), 128 * (GROUPS + 1))
    return acc * inverse[:, None], lse


@gluon.jit
def consumer(
    CID: gl.constexpr, o_desc, lse, tiles, fulls, order, heads, band, scales,
    SHAPE: gl.constexpr, MASKS: gl.constexpr, MATHS: gl.constexpr, HOW: gl.constexpr, PLANNED: gl.constexpr,
):  # fmt: skip
    """Partitions 1 to 3: attention of 64 query rows of every row tile of this block."""
    q_s, k_s, v_s, o_s = tiles
    q_full, k_full, v_full = fulls
    LEFT, RIGHT, _tail = MASKS
    TURNS, _ordered, Q_COLUMNS, _overlap = HOW
    GROUPS, BN, D, KV_SLOTS, Q_SLOTS = SHAPE
    SLOTS: gl.constexpr = max(Q_SLOTS, 1)
    BM: gl.constexpr = 64 * GROUPS
    THREADS: gl.constexpr = 128 * (GROUPS + 1)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    seq_q, _keys, pad, _diagonal, leftmost = band
    if TURNS and CID == GROUPS - 1:
        bar_arrive(turn_of(CID + 1, SHAPE), 256)  # group 0 has the first turn
    count = tile_count(order, PLANNED)
    g = 0
    m, row = tile_at(0, order, RIGHT, PLANNED)
    for r in range(count):
        m_next, row_next = tile_at(gl.minimum(r + 1, count - 1), order, RIGHT, PLANNED)
        row0 = m * BM + CID * 64
        block_end, block_n = key_tiles(m * BM, BM, band, BN, MASKS)
        end, n = key_tiles(row0, 64, band, BN, MASKS)
        g = skip_tiles(gl.where(n > 0, block_end - end, block_n), g, (q_full, k_full, v_full), CID, SHAPE, TURNS)
        slot = r % SLOTS
        mbarrier.wait(q_full.index(slot * GROUPS + CID), (r // SLOTS) & 1)
        if n > 0:
            q_tile = q_s.index(slot * GROUPS + CID)
            q = (q_tile, q_tile)
            if Q_COLUMNS > 0:
                q = (q_tile.slice(0, Q_COLUMNS, 1).load(gl.DotOperandLayout(0, S_LAYOUT, 2)), q_tile)
            if Q_COLUMNS == D:
                bar_arrive(slot + q_free(KV_SLOTS), THREADS)
            p16, m_i, l_i = first_tile(
                CID, q, g, row0, (end - 1) * BN, k_s, k_full, band, scales, SHAPE, MASKS, MATHS, HOW
            )
            acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
            n_full = n
            if LEFT:  # the tiles that every row of the group sees whole, from the right
                lo = gl.maximum(pad, row0 + 63 + leftmost)
                n_full = gl.minimum(n, gl.maximum(1, end - (lo + BN - 1) // BN))
            for i in range(1, n_full):  # noqa: B007
                g += 1
                p16, acc, m_i, l_i = next_tile(
                    CID, q, g, p16, acc, m_i, l_i, row0, 0, (k_s, v_s), fulls, band, scales, False,
                    SHAPE, MASKS, MATHS, HOW,
                )  # fmt: skip
            if LEFT:
                for i in range(n_full, n):
                    g += 1
                    p16, acc, m_i, l_i = next_tile(
                        CID, q, g, p16, acc, m_i, l_i, row0, (end - 1 - i) * BN, (k_s, v_s), fulls, band, scales, True,
                        SHAPE, MASKS, MATHS, HOW,
                    )  # fmt: skip
            if Q_SLOTS > 0 and Q_COLUMNS < D:
                bar_arrive(slot + q_free(KV_SLOTS), THREADS)
            o, lse_rows = last_product(g, p16, acc, m_i, l_i, v_s, v_full, SHAPE, MASKS)
            g += 1
            if LEFT:
                g = skip_tiles(block_n - (block_end - end) - n, g, fulls, CID, SHAPE, TURNS)
            rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
            gl.store(lse + row.to(gl.int64) * seq_q + rows, lse_rows, mask=rows < seq_q)
            store_tile(o, o_desc, o_s.index(CID), row, row0, heads[0], D)
            if Q_SLOTS == 0:  # o went out through q's buffer
                tma_store_wait(0)
                bar_arrive(slot + q_free(KV_SLOTS), THREADS)
        else:
            bar_arrive(slot + q_free(KV_SLOTS), THREADS)
        m = m_next
        row = row_next
    tma_store_wait(0)


# ---- epilogue


@gluon.jit
def store_tile(o, o_desc, staged, row, row0, heads, D: gl.constexpr):
    """Send o [64, D] to global memory, by way of shared memory; the copy goes on while the next tile is computed."""
    tma_store_wait(0)  # the tile before has left the buffer
    group_barrier()
    staged.store(o.to(staged.dtype))
    fence_async_shared()
    group_barrier()
    tma_store(o_desc, [row // heads, row % heads, row0, 0], staged.reshape([1, 1, 64, D]))


# ---- kernel


@gluon.jit(
    do_not_specialize=[
        "table_rounds", "row_tiles", "rows", "heads", "group", "batch_group", "seq_q", "keys", "pad", "diagonal", "leftmost",
    ]
)  # fmt: skip
def gluon_attention_forward(
    q_desc, k_desc, v_desc, o_desc, lse, table,
    table_rounds, row_tiles, rows, heads, group, batch_group, seq_q, keys, pad, diagonal, leftmost, scale, cap,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, FOLD: gl.constexpr, NEGATE: gl.constexpr,
    SOFTCAP: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    KV_SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr, TURNS: gl.constexpr, ORDERED: gl.constexpr,
    Q_COLUMNS: gl.constexpr, OVERLAP: gl.constexpr, PLANNED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """o[i] = sum_j softmax_j(logits(q[i].k[j])) v[j] and lse[i] (natural log) of all rows of all heads.

    Query i sees key tile position j iff max(pad, i + leftmost) <= j < min(keys, i + diagonal); key j of the tensor stands at
    position j + pad. The fields of configs.ForwardConfig say what the capitals from GROUPS on mean.
    """
    dtype: gl.constexpr = q_desc.dtype
    SHAPE: gl.constexpr = (GROUPS, BLOCK_N, BLOCK_D, KV_SLOTS, Q_SLOTS)
    MASKS: gl.constexpr = (LEFT, RIGHT, TAIL)
    MATHS: gl.constexpr = (FOLD, NEGATE, SOFTCAP)
    HOW: gl.constexpr = (TURNS, ORDERED, Q_COLUMNS, OVERLAP)
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_s = gl.allocate_shared_memory(dtype, [max(Q_SLOTS, 1) * GROUPS, 64, BLOCK_D], TILE)
    k_s = gl.allocate_shared_memory(dtype, [KV_SLOTS, BLOCK_N, BLOCK_D], TILE)
    v_s = gl.allocate_shared_memory(dtype, [KV_SLOTS, BLOCK_N, BLOCK_D], TILE)
    if Q_SLOTS == 0:  # noqa: SIM108  a branch at compile time
        o_s = q_s
    else:
        o_s = gl.allocate_shared_memory(dtype, [GROUPS, 64, BLOCK_D], TILE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [max(Q_SLOTS, 1) * GROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], BARRIER)
    for c in gl.static_range(max(Q_SLOTS, 1) * GROUPS):
        mbarrier.init(q_full.index(c), count=1)
    for c in gl.static_range(KV_SLOTS):
        mbarrier.init(k_full.index(c), count=1)
        mbarrier.init(v_full.index(c), count=1)
    fence_async_shared()
    fulls = (q_full, k_full, v_full)
    order = (table, table_rounds, row_tiles, rows)
    sizes = (heads, group, batch_group)
    band = (seq_q, keys, pad, diagonal, leftmost)
    scales = (scale, cap)
    tiles = (q_s, k_s, v_s, o_s)
    if GROUPS == 2:
        gl.warp_specialize([
            (producer, ((q_desc, k_desc, v_desc), (q_s, k_s, v_s), fulls, order, sizes, band, SHAPE, MASKS, PLANNED)),
            (consumer, (gl.constexpr(0), o_desc, lse, tiles, fulls, order, sizes, band, scales, SHAPE, MASKS, MATHS, HOW, PLANNED)),
            (consumer, (gl.constexpr(1), o_desc, lse, tiles, fulls, order, sizes, band, scales, SHAPE, MASKS, MATHS, HOW, PLANNED)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, ((q_desc, k_desc, v_desc), (q_s, k_s, v_s), fulls, order, sizes, band, SHAPE, MASKS, PLANNED)),
            (consumer, (gl.constexpr(0), o_desc, lse, tiles, fulls, order, sizes, band, scales, SHAPE, MASKS, MATHS, HOW, PLANNED)),
            (consumer, (gl.constexpr(1), o_desc, lse, tiles, fulls, order, sizes, band, scales, SHAPE, MASKS, MATHS, HOW, PLANNED)),
            (consumer, (gl.constexpr(2), o_desc, lse, tiles, fulls, order, sizes, band, scales, SHAPE, MASKS, MATHS, HOW, PLANNED)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
