# ruff: noqa: RUF059  what belongs together travels together, and each role takes of it what it needs
"""The backward kernels for Hopper: FlashAttention-2 (Dao 2023), algorithm 2, warp-specialised. The pipelines are drawn
in docs/gluon-pipeline-backward.md.

Two ways to the same gradients. *Fused*, up to head_dim 128: row_statistics, gradients_fused, round_dq; five products a
tile, dQ summed over key tiles in global memory in whatever order they come: in float32, or in fixed point, where order
does not matter. *Two-kernel*, above: row_statistics, gradients_kv, gradients_q; seven products, every sum in one fixed
order.

In every kernel partition 0 is the producer, which moves tiles by TMA, and partitions 1 and 2 are consumers, which own
64 rows, or one of two results, each. Tensors are (batch, heads, seq, head_dim); descriptors fill what lies past their
end with zeros and do not store it. Logits live in the log2 domain. Scores and their gradients are kept transposed,
[keys, queries], where keys are what a program owns, so that they are A operands in registers.
"""

import triton
import triton.language as tl

from flash2.backends.gluon_hopper.compat import (
    FIRST_BARRIER,
    HASTY,
    WHOLE,
    fence_async_shared,
    gl,
    gluon,
    group_barrier,
    mbarrier,
    reinterpret,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flash2.backends.gluon_hopper.forward import planned_count, planned_tile

# Named barriers, of which a block has 16; no kernel uses two that share an id.
FREE = FIRST_BARRIER  # + stage, at most 3: a stage of the ring of queries (gradients_q: of keys) is free again
V_FREE = gl.constexpr(FIRST_BARRIER.value + 3)  # + stage, at most 2: a stage of the ring of values
DS_READY = gl.constexpr(FIRST_BARRIER.value + 4)  # consumer <-> consumer: dS is in shared memory
HANDED = gl.constexpr(FIRST_BARRIER.value + 4)  # + 2 slot + consumer: its half of dS is there for who computes dQ
FINISHED = gl.constexpr(FIRST_BARRIER.value + 8)  # consumers -> producer: the outputs are in shared memory
DONE = gl.constexpr(FIRST_BARRIER.value + 9)  # all who read K and V: they become the staging area of dK and dV

SLOTS = gl.constexpr(2)  # of K and V: the next key tile's are loaded while this one's are in use


@gluon.jit
def consumers_sync(id: gl.constexpr):
    gl.inline_asm_elementwise("bar.sync $1, 256; // $0", "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def everyone_sync(id):
    gl.inline_asm_elementwise("bar.sync $1, 384; // $0", "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def everyone_arrive(id):
    gl.inline_asm_elementwise("bar.arrive $1, 384; // $0", "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pair_sync(id):
    gl.inline_asm_elementwise("bar.sync $1, 256; // $0", "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pair_arrive(id):
    gl.inline_asm_elementwise("bar.arrive $1, 256; // $0", "=r,r", [id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque_zero():
    """A zero that LLVM cannot see: it hoists dozens of wgmma descriptors out of a loop otherwise, which spill."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def loads_stay_below():
    """ptxas moves no load over it: what is loaded here may take registers that are in use above."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


# ---- accumulators: layouts, and renamings of registers


@gluon.constexpr_function
def acc_layout(columns):
    """A wgmma accumulator [64, columns] of one warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def lanes_layout(n):
    """64 n values of a warp group: 16 bytes a lane, 512 contiguous bytes a warp."""
    k = (n // 8).bit_length() - 1
    return gl.DistributedLinearLayout([[1], [2]] + [[128 << j] for j in range(k)], [[4], [8], [16], [32], [64]],
                                      [[128 << k], [256 << k]], [], [64 * n])  # fmt: skip


@gluon.constexpr_function
def pairs_layout(n):
    """32 n pairs of values of a warp group: 8 bytes a lane, 256 contiguous bytes a warp."""
    k = (n // 4).bit_length() - 1
    return gl.DistributedLinearLayout([[32 << j] for j in range(k)], [[1], [2], [4], [8], [16]],
                                      [[32 << k], [64 << k]], [], [32 * n])  # fmt: skip


@gluon.jit
def to_lanes(x):
    """Accumulator [64, n] -> [64 n] in the order in which threads hold it: no data moves."""
    n: gl.constexpr = x.shape[1]
    y = x.reshape([4, 2, 8, n // 8, 4, 2]).permute((0, 3, 2, 4, 1, 5)).reshape([64 * n])
    return gl.convert_layout(y, lanes_layout(n), assert_trivial=True)


@gluon.jit
def halves_of(y):
    """What to_lanes() gives, in two: a warp's first half of columns, and its second."""
    n: gl.constexpr = y.shape[0] // 2
    first, second = y.reshape([4, 2, n // 4]).permute((0, 2, 1)).split()
    L: gl.constexpr = lanes_layout(n // 64)
    return (gl.convert_layout(first.reshape([n]), L, assert_trivial=True),
            gl.convert_layout(second.reshape([n]), L, assert_trivial=True))  # fmt: skip


@gluon.jit
def from_lanes(y, n: gl.constexpr):
    """The inverse of to_lanes()."""
    x = y.reshape([4, n // 8, 8, 4, 2, 2]).permute((0, 4, 2, 1, 3, 5)).reshape([64, n])
    return gl.convert_layout(x, acc_layout(n), assert_trivial=True)


@gluon.jit
def a_operand(x, n: gl.constexpr, dtype: gl.constexpr):
    """float32 accumulator x as a 16-bit A operand, in registers, of a product with n columns."""
    L: gl.constexpr = gl.DotOperandLayout(0, acc_layout(n), 2)
    return gl.convert_layout(x.to(dtype), L)


# ---- TMA of one (batch, head)


@gluon.jit
def load_rows(desc, where, row, full, tile):
    """Rows row.. of one head into `tile` [rows, head_dim]; barrier `full` must expect them."""
    batch, head = where
    tma_load(desc, [batch, head, row, 0], full, reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout))


@gluon.jit
def store_rows(desc, where, row, tile):
    """`tile` [rows, head_dim] to rows row.. of one head, those that exist; fenced by whoever wrote it."""
    batch, head = where
    tma_store(desc, [batch, head, row, 0], reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout))


# ---- masks and logits


@gluon.jit
def query_range(start_n, seq_q, seq_kv, band, BM: gl.constexpr, BN: gl.constexpr, MASKS: gl.constexpr):
    """Query tiles (lo, full_lo, full_hi, hi): [lo, hi) see a key of start_n.., of which [full_lo, full_hi) all of them.

    Rows past seq_q need no mask: their statistics make their probabilities 0.
    """
    left, right = band
    LEFT, RIGHT, TAIL = MASKS
    offset = seq_kv - seq_q
    last = gl.minimum(start_n + BN, seq_kv) - 1
    lo = 0
    hi = gl.cdiv(seq_q, BM)
    if RIGHT:
        lo = gl.minimum(gl.maximum(start_n - offset - right, 0) // BM, hi)
    if LEFT:
        hi = gl.maximum(lo, gl.minimum(hi, gl.cdiv(gl.maximum(last + left - offset + 1, 0), BM)))
    full_lo = lo
    full_hi = hi
    if RIGHT:
        full_lo = gl.minimum(gl.cdiv(gl.maximum(last - offset - right, 0), BM), hi)
    if LEFT:
        full_hi = gl.minimum(gl.maximum(start_n + left - offset + 1, 0) // BM, hi)
    if TAIL:
        full_lo = gl.where(start_n + BN > seq_kv, hi, full_lo)
    return lo, full_lo, gl.maximum(full_lo, full_hi), hi


@gluon.jit
def key_range(start_m, seq_q, seq_kv, band, BM: gl.constexpr, BN: gl.constexpr, MASKS: gl.constexpr):
    """Key tiles (lo, full_lo, full_hi, hi): [lo, hi) are seen by a row of start_m.., [full_lo, full_hi) by all of them."""
    left, right = band
    LEFT, RIGHT, TAIL = MASKS
    first = start_m + seq_kv - seq_q
    last = gl.minimum(start_m + BM, seq_q) - 1 + seq_kv - seq_q
    lo = 0
    hi = gl.cdiv(seq_kv, BN)
    full_lo = 0
    full_hi = seq_kv // BN
    if RIGHT:
        hi = gl.minimum(hi, gl.cdiv(gl.maximum(last + right + 1, 0), BN))
        full_hi = gl.minimum(full_hi, gl.maximum(first + right + 1, 0) // BN)
    if LEFT:
        lo = gl.minimum(gl.maximum(first - left, 0) // BN, hi)
        full_lo = gl.minimum(gl.cdiv(gl.maximum(last - left, 0), BN), hi)
    return lo, full_lo, gl.maximum(full_lo, full_hi), hi


@gluon.jit
def edges_of(start_m, start_n, lengths, band):
    """(right, left, end): query start_m + i sees key start_n + j iff j <= i + right, j >= i + left and j < end."""
    seq_q, seq_kv = lengths
    left, right = band
    diagonal = seq_kv - seq_q + start_m - start_n
    return diagonal + right, diagonal - left, seq_kv - start_n


@gluon.jit
def edges_before(edges, rows):
    """The edges counted from `rows` queries earlier."""
    right, left, end = edges
    return right - rows, left - rows, end


@gluon.jit
def visible(i, j, edges, MASKS: gl.constexpr):
    """Does query i see key j, counted as edges_of() counts them?"""
    right, left, end = edges
    LEFT, RIGHT, TAIL = MASKS
    if RIGHT:
        keep = j <= i + right
        if LEFT:
            keep = keep & (j >= i + left)
        if TAIL:
            keep = keep & (j < end)
    elif LEFT:
        keep = j >= i + left
        if TAIL:
            keep = keep & (j < end)
    else:
        keep = j < end
    return keep


@gluon.jit
def logits(s, maths, SOFTCAP: gl.constexpr):
    """(logit, slope): log2 e times the logit, and d logit / d (s * scale), from products s = q.k.

    maths is (factor on s, factor after it): without a softcap scale * log2(e); with one exp(2 x) = exp2(factor s),
    tanh(x) = 1 - 2 / (1 + exp(2 x)), and softcap * log2(e). tanh's error is absolute, 1e-7, which is what a logit bears.
    """
    factor, cap = maths
    if SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + gl.exp2(s * factor))
        return t * cap, 1.0 - t * t
    else:
        return s * factor, 1.0


@gluon.jit
def probabilities(s, lse, start, edges, maths, KEYS_OWNED: gl.constexpr,
                  MASK: gl.constexpr, MASKS: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """(p, slope) of a tile: p = exp2(logit - lse), 0 where a query does not see a key, and p d logit / d (s * scale).
    lse None: s began with it.

    Its 64 rows are the keys this consumer owns, its columns queries start..; or the other way round.
    """
    L: gl.constexpr = acc_layout(s.shape[1])
    x, slope = logits(s, maths, SOFTCAP)
    if lse is not None:
        x = x - (lse[None, :] if KEYS_OWNED else lse[:, None])
    if MASK:
        rows = gl.arange(0, 64, gl.SliceLayout(1, L)) + opaque_zero()  # not hoisted out of the loop: that spills
        columns = gl.arange(0, s.shape[1], gl.SliceLayout(0, L)) + start
        if KEYS_OWNED:
            keep = visible(columns[None, :], rows[:, None], edges, MASKS)
        else:
            keep = visible(rows[:, None], columns[None, :], edges, MASKS)
        x = gl.where(keep, x, -float("inf"))
    p = gl.exp2(x)
    if SOFTCAP:
        return p, p * slope
    else:
        return p, p


@gluon.jit
def weights(i, s, stats, edges, maths, MASK: gl.constexpr, MASKS: gl.constexpr, SHAPE: gl.constexpr,
            LSE_FIRST: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """probabilities() of step i, transposed, where a program owns keys."""
    BM, BN, D, STAGES = SHAPE
    if LSE_FIRST:
        return probabilities(s, None, i * BM, edges, maths, True, MASK, MASKS, SOFTCAP)
    else:
        lse = stats.slice(0, BM, 0).load(gl.SliceLayout(0, acc_layout(BM)))
        return probabilities(s, lse, i * BM, edges, maths, True, MASK, MASKS, SOFTCAP)


@gluon.jit
def half(tiles, slot, n, D: gl.constexpr):
    """The n-th half of the memory of tile `slot`, 128 by D, of `tiles` as one [64, D]."""
    SLOTS: gl.constexpr = tiles.shape[0] * tiles.shape[1] * tiles.shape[2] // (64 * D)
    return reinterpret(tiles, tiles.dtype, [SLOTS, 64, D], tiles.layout).index(2 * slot + n)


# ---- fused: a program owns 128 keys and walks over the query tiles of all heads that share them


@gluon.jit
def rows_used(D: gl.constexpr):
    """Reckon a consumer's rows here, beside the stores that need them: ptxas keeps them over the whole loop otherwise."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, acc_layout(D)))
    gl.inline_asm_elementwise("// $0 $1", "=r,r", [rows], dtype=gl.int32, is_pure=False, pack=1)


# The order in which programs own key tiles: in turns, as planned, or all those of a head one program.
IN_TURNS, PLANNED, BY_HEADS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def block_count(schedule, ORDER: gl.constexpr):
    """How many key tiles this program owns, one after the other."""
    table, rounds, tiles, rows, together = schedule
    if ORDER == PLANNED:
        return planned_count(table, rounds)
    elif ORDER == BY_HEADS:
        return gl.cdiv(rows - gl.program_id(0), gl.num_programs(0)) * tiles
    else:
        return gl.cdiv(tiles * rows - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def block_at(r, schedule, ORDER: gl.constexpr):
    """(key tile, (batch, head of keys)) of this program's round r."""
    table, rounds, tiles, rows, together = schedule
    if ORDER == PLANNED:  # schedule.py
        return planned_tile(table, r)
    elif ORDER == BY_HEADS:
        return r % tiles, r // tiles * gl.num_programs(0) + gl.program_id(0)
    else:  # causal: the first keys are seen by the most rows
        return program_tile(r * gl.num_programs(0) + gl.program_id(0), tiles, rows, together)


@gluon.jit
def place_of(tile, row, heads_kv, BN: gl.constexpr):
    """(batch, head of keys, first key) of a key tile."""
    return row // heads_kv, row % heads_kv, tile * BN


@gluon.jit
def walk_of(tile, row, sizes, band, SHAPE: gl.constexpr, MASKS: gl.constexpr):
    """(place, walk) of a key tile: where it is, and which query tiles it walks over."""
    heads_kv, group, seq_q, seq_kv = sizes
    BM, BN, D, STAGES = SHAPE
    lo, full_lo, full_hi, hi = query_range(tile * BN, seq_q, seq_kv, band, BM, BN, MASKS)
    n = hi - lo
    # Statistics and the accumulator of dQ are padded to multiples of 128 queries.
    walk = (lo, n, gl.cdiv(seq_q, 128) * (128 // BM), group, heads_kv * group)
    return place_of(tile, row, heads_kv, BN), walk


@gluon.constexpr_function
def may_be_blind(CID, MASKS, GROUPED):
    """Are steps left out in which none of a consumer's keys is seen? Under a causal mask the second's are seen later.

    Without groups there is one such step a key tile, its first, which nothing runs beside: leaving it out costs 1 %.
    """
    return GROUPED and MASKS[1] and CID == 1


@gluon.jit
def own_steps(
    CID: gl.constexpr, tile, walk, sizes, band, SHAPE: gl.constexpr, MASKS: gl.constexpr, SOFTCAP: gl.constexpr
):  # fmt: skip
    """(blind, full_lo, full_hi, n) of a walk of n steps, for a consumer's 64 keys: in the first `blind` none is seen, in
    [full_lo, full_hi) all are. With a softcap, which leaves no registers for more, for all 128."""
    heads_kv, group, seq_q, seq_kv = sizes
    BM, BN, D, STAGES = SHAPE
    LEFT, RIGHT, TAIL = MASKS
    lo, n, tiles, _group, heads = walk
    if not (LEFT or RIGHT or TAIL):
        return 0, 0, n, n
    KEYS: gl.constexpr = BN if SOFTCAP else 64
    start_n = tile * BN + (0 if SOFTCAP else CID * 64)
    own_lo, full_lo, full_hi, _hi = query_range(start_n, seq_q, seq_kv, band, BM, KEYS, MASKS)
    return gl.minimum(own_lo - lo, n), gl.minimum(full_lo - lo, n), gl.minimum(full_hi - lo, n), n


@gluon.jit
def step_at(place, walk, i, TURNS: gl.constexpr):
    """(batch, head, query tile, its number among all heads') of step i: those of a key tile go through its query tiles,
    head of the group by head; or, with TURNS, query tile by query tile, each of all heads."""
    batch, head_kv, start_n = place
    lo, n, tiles, group, heads = walk
    if TURNS:
        turn = i // group
        member = i - turn * group
        t = lo + turn
    else:
        member = i // gl.maximum(n, 1)
        t = lo + i - member * n
    head = head_kv * group + member
    return batch, head, t, (batch * heads + head) * tiles + t


@gluon.jit
def load_queries(descs, rings, step, g, SHAPE: gl.constexpr):
    """A step's Q, its statistics, and dO, into the stage of step g, which counts on from one key tile to the next."""
    q_desc, do_desc, stats_desc = descs
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    batch, head, t, index = step
    BM, BN, D, STAGES = SHAPE
    b = g % STAGES
    mbarrier.expect(q_full.index(b), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
    load_rows(q_desc, (batch, head), t * BM, q_full.index(b), q_ring.index(b))
    tma_load(stats_desc, [index * 2 * BM], q_full.index(b), stats_ring.index(b))
    mbarrier.expect(do_full.index(b), do_desc.block_type.nbytes)
    load_rows(do_desc, (batch, head), t * BM, do_full.index(b), do_ring.index(b))


@gluon.jit
def load_ahead(
    ahead, until, limit, count, descs, kv_descs, rings, kv, schedule, sizes, band,
    SHAPE: gl.constexpr, MASKS: gl.constexpr, ORDER: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Load until step `until`, or the end of the program's key tile before `limit`, whose buffers are not free yet.

    ahead: how many steps were loaded; of the next one its number in its key tile, that one's round, number and head, how
    many steps it has, and what step_at() says of it: reckoned beforehand, since the consumers may be waiting for the load.
    Returns it.
    """
    k_desc, v_desc, dk_desc, dv_desc = kv_descs
    k_tile, v_tile, k_full, v_full, finished = kv
    BM, BN, D, STAGES = SHAPE
    g, i, r, tile, row, total, batch, head, t, index = ahead
    while (g < until) & (r < limit):
        if i > 0:
            load_queries(descs, rings, (batch, head, t, index), g, SHAPE)
        else:
            on, of, start_n = place_of(tile, row, sizes[0], BN)
            slot = r % SLOTS
            tma_store_wait(0)  # dK and dV of the tile that was here have left
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            load_rows(k_desc, (on, of), start_n, k_full.index(slot), k_tile.index(slot))
            if total > 0:
                load_queries(descs, rings, (batch, head, t, index), g, SHAPE)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            load_rows(v_desc, (on, of), start_n, v_full.index(slot), v_tile.index(slot))
        g += gl.where(total > 0, 1, 0)
        i += 1
        if i >= total:
            i = 0
            r += 1
            tile, row = block_at(gl.minimum(r, count - 1), schedule, ORDER)
        place, walk = walk_of(tile, row, sizes, band, SHAPE, MASKS)
        total = walk[1] * walk[3]
        batch, head, t, index = step_at(place, walk, i, TURNS)
    return g, i, r, tile, row, total, batch, head, t, index


@gluon.jit
def fused_producer(
    descs, kv_descs, rings, kv, schedule, sizes, band,
    SHAPE: gl.constexpr, MASKS: gl.constexpr, ORDER: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Partition 0: loads K and V of every key tile, Q and dO and statistics of every step; stores dK and dV. The loads of
    the next key tile begin before this one is done."""
    k_desc, v_desc, dk_desc, dv_desc = kv_descs
    k_tile, v_tile, k_full, v_full, finished = kv
    BM, BN, D, STAGES = SHAPE
    count = block_count(schedule, ORDER)
    tile, row = block_at(0, schedule, ORDER)
    g = 0  # steps of the key tiles before
    place, walk = walk_of(tile, row, sizes, band, SHAPE, MASKS)
    batch, head, t, index = step_at(place, walk, 0, TURNS)
    ahead = load_ahead(
        (0, 0, 0, tile, row, walk[1] * walk[3], batch, head, t, index), STAGES, gl.minimum(SLOTS, count), count,
        descs, kv_descs, rings, kv, schedule, sizes, band, SHAPE, MASKS, ORDER, TURNS,
    )  # fmt: skip
    for r in range(count):
        place, walk = walk_of(tile, row, sizes, band, SHAPE, MASKS)
        batch, head_kv, start_n = place
        total = walk[1] * walk[3]
        tile, row = block_at(gl.minimum(r + 1, count - 1), schedule, ORDER)
        limit = gl.minimum(r + SLOTS, count)
        for i in range(g, g + total):
            everyone_sync(FREE + i % STAGES)
            ahead = load_ahead(
                ahead, i + 1 + STAGES, limit, count, descs, kv_descs, rings, kv, schedule, sizes, band, SHAPE, MASKS, ORDER, TURNS,
            )  # fmt: skip
        g += total
        mbarrier.wait(finished.index(r % 2), (r // 2) & 1)
        for part in gl.static_range(2):
            store_rows(dv_desc, (batch, head_kv), start_n + part * 64, half(v_tile, r % SLOTS, part, D))
            store_rows(dk_desc, (batch, head_kv), start_n + part * 64, half(k_tile, r % SLOTS, part, D))
        ahead = load_ahead(  # of tiles with fewer steps than stages
            ahead, g + STAGES, gl.minimum(r + 1 + SLOTS, count), count, descs, kv_descs, rings, kv, schedule, sizes, band,
            SHAPE, MASKS, ORDER, TURNS,
        )  # fmt: skip
    tma_store_wait(0)


@gluon.jit
def own_keys(CID: gl.constexpr, tiles, slot, registers, RESIDENT: gl.constexpr):
    """A consumer's 64 rows of K or V as an A operand."""
    if RESIDENT:
        return registers
    else:
        return tiles.index(opaque_zero() + slot).slice(CID * 64, 64, 0)


@gluon.jit
def issue_scores(
    CID: gl.constexpr, i, end, rings, k_tile, slot, own, SHAPE: gl.constexpr, LSE_FIRST: gl.constexpr, RESIDENT: gl.constexpr
):  # fmt: skip
    """Begin S^T of step i for this consumer's 64 keys; past the last step of a key tile nobody looks at it.

    end: one past the last step whose Q is on its way. The first of the next key tile belongs to it: the product that
    nobody looks at may not read what is being loaded.
    """
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    BM, BN, D, STAGES = SHAPE
    b = i % STAGES
    mbarrier.wait(q_full.index(b), (i // STAGES) & 1, pred=i < end)
    k = own_keys(CID, k_tile, slot, own[0], RESIDENT)
    zeros = gl.zeros([64, BM], gl.float32, acc_layout(BM))
    if LSE_FIRST:  # as with delta: no registers for lse beside s
        lse = stats_ring.index(b).slice(0, BM, 0).load(gl.SliceLayout(0, acc_layout(BM)))
        less, _ = gl.broadcast(lse[None, :], zeros)
        return warpgroup_mma(k, q_ring.index(b).permute((1, 0)), less, is_async=True)
    else:
        return warpgroup_mma(k, q_ring.index(b).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def issue_dq(part, ds, k, N: gl.constexpr, SHAPE: gl.constexpr):
    """Begin part `part`, [64, N], of a step's dQ = dS K: all of 64 queries' columns or N of them; 64 of 128 queries."""
    BM, BN, D, STAGES = SHAPE
    no_dq = gl.zeros([64, N], gl.float32, acc_layout(N))
    if BM == 64:
        return warpgroup_mma(ds.permute((1, 0)), k.slice(part * N, N, 1), no_dq, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(ds.slice(part * 64, 64, 1).permute((1, 0)), k, no_dq, use_acc=False, is_async=True)


@gluon.jit
def rows_factor(sums, index, part, N: gl.constexpr, SHAPE: gl.constexpr, FIXED: gl.constexpr):
    """What a part of dQ is multiplied with on its way: rows by powers of two, before they are rounded; or by the scale."""
    acc, factors = sums
    BM, BN, D, STAGES = SHAPE
    if FIXED:
        row = index * BM
        if BM == 128:
            row += part * 64
        return gl.load(factors + row + gl.arange(0, 64, gl.SliceLayout(1, acc_layout(N))))
    else:
        return factors


@gluon.jit
def add_dq(sums, index, part, dq, factor, SHAPE: gl.constexpr, FIXED: gl.constexpr):
    """Add part `part` of the dQ of query tile `index` to the sums in global memory: straight from registers, in the order
    in which threads hold it.

    Fixed point: two neighbours in the halves of a 64-bit integer, so that one addition is two.
    """
    acc, factors = sums
    BM, BN, D, STAGES = SHAPE
    N: gl.constexpr = dq.shape[1]
    at = (index * (BM * D // (64 * N)) + part).to(gl.int64)
    if FIXED:
        x = gl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,f", [dq * factor[:, None]], dtype=gl.int32, is_pure=True, pack=1)  # fmt: skip
        low, high = x.reshape([4, 2, 8, N // 8, 4, 2]).permute((0, 3, 1, 2, 4, 5)).split()
        both = ((high.to(gl.int64) << 32) + low.to(gl.int64)).reshape([32 * N])
        both = gl.convert_layout(both, pairs_layout(N), assert_trivial=True)
        places = gl.arange(0, 32 * N, pairs_layout(N))
        gl.atomic_add(acc + at * (32 * N) + places, both, sem="relaxed")
    else:
        places = gl.arange(0, 64 * N, lanes_layout(N))
        gl.atomic_add(acc + at * (64 * N) + places, to_lanes(dq * factor), sem="relaxed")


@gluon.jit
def add_half(sums, index, part, h: gl.constexpr, x, SHAPE: gl.constexpr):
    """Half h of what add_dq() adds in float32: x, of halves_of()."""
    acc, scale = sums
    BM, BN, D, STAGES = SHAPE
    n: gl.constexpr = x.shape[0]
    at = (index * (BM * D // (2 * n)) + part).to(gl.int64)
    places = gl.arange(0, n, lanes_layout(n // 64))
    gl.atomic_add(
        acc + at * (2 * n) + (places + places // (n // 4) * (n // 4) + h * (n // 4)), x * scale, sem="relaxed"
    )


@gluon.jit
def less_delta(b, rings, SHAPE: gl.constexpr):
    """-delta of the queries in stage b."""
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    BM, BN, D, STAGES = SHAPE
    return stats_ring.index(b).slice(BM, BM, 0).load(gl.SliceLayout(0, acc_layout(BM)))


@gluon.jit
def issue_dp(CID: gl.constexpr, b, less, rings, v_tile, slot, own, SHAPE: gl.constexpr, RESIDENT: gl.constexpr):
    """Begin dP^T of the step in stage b. Its accumulator begins with less_delta(), which needs no registers beside p and dP then."""
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    BM, BN, D, STAGES = SHAPE
    v = own_keys(CID, v_tile, slot, own[1], RESIDENT)
    begin, _ = gl.broadcast(less[None, :], gl.zeros([64, BM], gl.float32, acc_layout(BM)))
    return warpgroup_mma(v, do_ring.index(b).permute((1, 0)), begin, is_async=True)


@gluon.jit
def fused_step(CID: gl.constexpr, MASK: gl.constexpr, i, t, index, s, dk, dv, end, rings, kv, slot, own, ds_tile, sums,
               edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, HOW: gl.constexpr):  # fmt: skip
    """One query tile, the index-th of all heads': dv += p^T dO, dk += ds^T Q, and half of dQ to the sums, if not APART.

    From where `edges` count it is the t-th, or without a t the i-th.
    s holds the scores of this step. Returns those of the next, and dk, dv.
    """
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    k_tile, v_tile, k_full, v_full, finished = kv
    BM, BN, D, STAGES = SHAPE
    APART, DQ_LATE, LSE_FIRST, DV_LATE, RESIDENT, SOFTCAP, FIXED, HALVES = HOW
    ds_ring, ds_free = ds_tile
    N: gl.constexpr = D * BM // 128
    dtype: gl.constexpr = q_ring.dtype
    # As in late_step(); where registers are free it costs 4 %.
    if not APART or (HASTY and MASKS[1]):
        i += opaque_zero()
    if not APART:
        index += opaque_zero()
    b = i % STAGES
    c = i % 2
    q = q_ring.index(b)
    do = do_ring.index(b)
    mbarrier.wait(do_full.index(b), (i // STAGES) & 1)
    dp_token = issue_dp(CID, b, less_delta(b, rings, SHAPE), rings, v_tile, slot, own, SHAPE, RESIDENT)
    p, slope = weights(
        i if t is None else t, s, stats_ring.index(b), edges, maths, MASK, MASKS, SHAPE, LSE_FIRST, SOFTCAP
    )
    if DV_LATE:  # neither p nor ds is in flight, in 16 bits, while both are there in 32
        dp = warpgroup_mma_wait(0, deps=[dp_token])
    else:
        dv_token = warpgroup_mma(a_operand(p, D, dtype), do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp_token])
    ds = (slope * dp).to(dtype)
    if DV_LATE:
        dv_token = warpgroup_mma(a_operand(p, D, dtype), do, dv, is_async=True)
    ds_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, acc_layout(D), 2))
    dk_token = warpgroup_mma(ds_operand, q, dk, is_async=True)
    if APART:
        mbarrier.wait(ds_free.index(c), ((i // 2) & 1) ^ 1)
    # Else the other consumer has used what was here: that of two steps ago, before it said that the last one's is there.
    ds_ring.index(c).slice(CID * 64, 64, 0).store(ds)
    fence_async_shared()
    if APART:
        pair_arrive(HANDED + 2 * c + CID)
        dv = warpgroup_mma_wait(1, deps=[dv_token])
        s_token = issue_scores(CID, i + 1, end, rings, k_tile, slot, own, SHAPE, LSE_FIRST, RESIDENT)
        dk = warpgroup_mma_wait(1, deps=[dk_token])
        everyone_arrive(FREE + b)
    else:
        factor = rows_factor(sums, index, CID, N, SHAPE, FIXED)
        consumers_sync(DS_READY)
        dq_token = issue_dq(CID, ds_ring.index(c), k_tile.index(opaque_zero() + slot), N, SHAPE)
        # before the next scores begin: two 16-bit A operands in flight are too many registers
        dv, dk = warpgroup_mma_wait(1, deps=[dv_token, dk_token])
        everyone_arrive(FREE + b)
        s_token = issue_scores(CID, i + 1, end, rings, k_tile, slot, own, SHAPE, LSE_FIRST, RESIDENT)
        dq = warpgroup_mma_wait(1, deps=[dq_token])
        add_dq(sums, index, CID, dq, factor, SHAPE, FIXED)
    s = warpgroup_mma_wait(0, deps=[s_token])  # one in flight over the loop's back edge is serialised by ptxas (C7514)
    return s, dk, dv


@gluon.jit
def fused_walk(CID: gl.constexpr, first, turns, base, s, dk, dv, end, steps, rings, kv, slot, own, ds_tile, sums,
               edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, HOW: gl.constexpr):  # fmt: skip
    """One head, or `turns` that take turns, from step `first` on, as own_steps() says: masked tiles, ones without a mask,
    and again masked ones."""
    blind, full_lo, full_hi, hi = steps
    LEFT, RIGHT, TAIL = MASKS
    if RIGHT or TAIL:
        for i in range(first, first + full_lo):
            t = None if turns is None else first + (i - first) // turns
            s, dk, dv = fused_step(CID, True, i, t, base + i, s, dk, dv, end, rings, kv, slot, own, ds_tile, sums,
                                   edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
    for i in range(first + full_lo, first + full_hi):
        s, dk, dv = fused_step(CID, False, i, None, base + i, s, dk, dv, end, rings, kv, slot, own, ds_tile, sums,
                               edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
    if LEFT:
        for i in range(first + full_hi, first + hi):
            t = None if turns is None else first + (i - first) // turns
            s, dk, dv = fused_step(CID, True, i, t, base + i, s, dk, dv, end, rings, kv, slot, own, ds_tile, sums,
                                   edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
    return s, dk, dv


# ---- fused, dQ a step late: the loop turns where nothing is in flight, between dP and dS


@gluon.jit
def blind_start(i, rings, SHAPE: gl.constexpr):
    """The first half of step i for keys of which its queries see none: (p, dP), which are 0."""
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    BM, BN, D, STAGES = SHAPE
    mbarrier.wait(q_full.index(i % STAGES), (i // STAGES) & 1)  # dK gets 0 times Q all the same
    mbarrier.wait(do_full.index(i % STAGES), (i // STAGES) & 1)
    zeros = gl.zeros([64, BM], gl.float32, acc_layout(BM))
    return zeros, zeros


@gluon.jit
def late_start(CID: gl.constexpr, BLIND: gl.constexpr, blind, i, dv, rings, kv, slot, own, edges, maths,
               MASKS: gl.constexpr, SHAPE: gl.constexpr, HOW: gl.constexpr):  # fmt: skip
    """The first half of a key tile's first step: (p, dP, dv)."""
    if BLIND:
        if blind:
            p, dp = blind_start(i, rings, SHAPE)
        else:
            p, dp, dv = seeing_start(CID, i, dv, rings, kv, slot, own, edges, maths, MASKS, SHAPE, HOW)
        return p, dp, dv
    else:
        return seeing_start(CID, i, dv, rings, kv, slot, own, edges, maths, MASKS, SHAPE, HOW)


@gluon.jit
def seeing_start(CID: gl.constexpr, i, dv, rings, kv, slot, own, edges, maths,
                 MASKS: gl.constexpr, SHAPE: gl.constexpr, HOW: gl.constexpr):  # fmt: skip
    """late_start() where some of the keys may be seen."""
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    k_tile, v_tile, k_full, v_full, finished = kv
    BM, BN, D, STAGES = SHAPE
    APART, DQ_LATE, LSE_FIRST, DV_LATE, RESIDENT, SOFTCAP, FIXED, HALVES = HOW
    LEFT, RIGHT, TAIL = MASKS
    b = i % STAGES
    s = warpgroup_mma_wait(0, deps=[issue_scores(CID, i, i + 1, rings, k_tile, slot, own, SHAPE, LSE_FIRST, RESIDENT)])
    mbarrier.wait(do_full.index(b), (i // STAGES) & 1)
    p, slope = weights(i, s, stats_ring.index(b), edges, maths, LEFT or RIGHT or TAIL, MASKS, SHAPE, LSE_FIRST, SOFTCAP)
    dv_token = warpgroup_mma(a_operand(p, D, q_ring.dtype), do_ring.index(b), dv, is_async=True)
    dp_token = issue_dp(CID, b, less_delta(b, rings, SHAPE), rings, v_tile, slot, own, SHAPE, RESIDENT)
    dv, dp = warpgroup_mma_wait(0, deps=[dv_token, dp_token])
    return slope, dp, dv


@gluon.jit
def hand_over(CID: gl.constexpr, i, p, dp, dk, rings, ds_ring):
    """dS of step i into the other consumer's hands; begins dk += ds^T Q."""
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    D: gl.constexpr = dk.shape[1]
    ds = (p * dp).to(q_ring.dtype)
    operand = gl.convert_layout(ds, gl.DotOperandLayout(0, acc_layout(D), 2))
    token = warpgroup_mma(operand, q_ring.index(i & (q_ring.shape[0] - 1)), dk, is_async=True)
    # The other consumer has used what was here, that of two steps ago, before it handed over the last one's.
    ds_ring.index(i & 1).slice(CID * 64, 64, 0).store(ds)
    fence_async_shared()
    pair_arrive(HANDED + 2 * (i & 1) + CID)
    return token


@gluon.jit
def late_step(CID: gl.constexpr, MASK: gl.constexpr, i, index, p, dp, dk, dv, rings, kv, slot, own, ds_ring, sums,
              edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, HOW: gl.constexpr):  # fmt: skip
    """The second half of step i - 1, whose query tile is the index-th of all heads', and the first half of step i.

    Its dQ is computed beside the softmax. Returns p and dP of step i, and dk, dv.
    """
    q_ring, do_ring, stats_ring, q_full, do_full = rings
    k_tile, v_tile, k_full, v_full, finished = kv
    BM, BN, D, STAGES = SHAPE
    APART, DQ_LATE, LSE_FIRST, DV_LATE, RESIDENT, SOFTCAP, FIXED, HALVES = HOW
    N: gl.constexpr = D * BM // 128
    gl.static_assert(STAGES & (STAGES - 1) == 0)  # %, of what may be negative, takes two registers too many
    i += opaque_zero()  # else what is reckoned from it for the next step takes registers in this one
    b = i & (STAGES - 1)
    c = (i + 1) & 1
    dk_token = hand_over(CID, i - 1, p, dp, dk, rings, ds_ring)
    factor = rows_factor(sums, index, CID, N, SHAPE, FIXED)
    s_token = issue_scores(CID, i, i + 1, rings, k_tile, slot, own, SHAPE, LSE_FIRST, RESIDENT)
    dk = warpgroup_mma_wait(1, deps=[dk_token])
    everyone_arrive(FREE + ((i - 1) & (STAGES - 1)))
    pair_sync(HANDED + 2 * c + 1 - CID)
    dq_token = issue_dq(CID, ds_ring.index(c), k_tile.index(opaque_zero() + slot), N, SHAPE)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.wait(do_full.index(b), (i // STAGES) & 1)
    p, slope = weights(i, s, stats_ring.index(b), edges, maths, MASK, MASKS, SHAPE, LSE_FIRST, SOFTCAP)
    # dV's issue also keeps the exponentials above the wait for dQ, where ptxas would not leave them.
    dv_token = warpgroup_mma(a_operand(p, D, q_ring.dtype), do_ring.index(b), dv, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq_token])
    # -delta takes registers that are dQ's until here. Its loads wait for all additions before them to leave the
    # multiprocessor: behind half of them they are there when the second half is on its way.
    if HALVES and not MASK:
        first, second = halves_of(to_lanes(dq))
        add_half(sums, index, CID, 0, first, SHAPE)
        loads_stay_below()
        less = less_delta(b, rings, SHAPE)
        add_half(sums, index + opaque_zero(), CID, 1, second, SHAPE)
        loads_stay_below()
    else:
        add_dq(sums, index, CID, dq, factor, SHAPE, FIXED)
        loads_stay_below()
        less = less_delta(b, rings, SHAPE)
    dp_token = issue_dp(CID, b, less, rings, v_tile, slot, own, SHAPE, RESIDENT)
    dv, dp = warpgroup_mma_wait(0, deps=[dv_token, dp_token])
    return slope, dp, dk, dv


@gluon.jit
def late_end(
    CID: gl.constexpr, i, index, p, dp, dk, rings, kv, slot, ds_ring, sums, SHAPE: gl.constexpr, HOW: gl.constexpr
):
    """The second half of step i, a key tile's last. Returns dk."""
    k_tile, v_tile, k_full, v_full, finished = kv
    BM, BN, D, STAGES = SHAPE
    APART, DQ_LATE, LSE_FIRST, DV_LATE, RESIDENT, SOFTCAP, FIXED, HALVES = HOW
    N: gl.constexpr = D * BM // 128
    dk_token = hand_over(CID, i, p, dp, dk, rings, ds_ring)
    factor = rows_factor(sums, index, CID, N, SHAPE, FIXED)
    pair_sync(HANDED + 2 * (i % 2) + 1 - CID)
    dq_token = issue_dq(CID, ds_ring.index(i % 2), k_tile.index(slot), N, SHAPE)
    dk = warpgroup_mma_wait(1, deps=[dk_token])
    everyone_arrive(FREE + i % STAGES)
    dq = warpgroup_mma_wait(0, deps=[dq_token])
    add_dq(sums, index, CID, dq, factor, SHAPE, FIXED)
    return dk


@gluon.jit
def blind_step(CID: gl.constexpr, i, index, p, dp, dk, rings, kv, slot, ds_ring, sums,
               SHAPE: gl.constexpr, HOW: gl.constexpr):  # fmt: skip
    """late_step() for keys of which step i's queries see none: no products but those of step i - 1. Returns p and dP of
    step i, and dk."""
    i += opaque_zero()
    dk = late_end(CID, i - 1, index, p, dp, dk, rings, kv, opaque_zero() + slot, ds_ring, sums, SHAPE, HOW)
    p, dp = blind_start(i, rings, SHAPE)
    return p, dp, dk


@gluon.jit
def late_walk(CID: gl.constexpr, first, begun, base, before, p, dp, dk, dv, steps, rings, kv, slot, own, ds_ring, sums,
              edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, HOW: gl.constexpr, GROUPED: gl.constexpr):  # fmt: skip
    """One head, as fused_walk() walks it, whose step `first` has begun if `begun` is 1; `before` is the query tile of the
    step before it. Returns that of its last one."""
    blind, full_lo, full_hi, hi = steps
    LEFT, RIGHT, TAIL = MASKS
    masked = begun
    if may_be_blind(CID, MASKS, GROUPED):
        for i in range(first + begun, first + blind):
            p, dp, dk = blind_step(CID, i, before, p, dp, dk, rings, kv, slot, ds_ring, sums, SHAPE, HOW)
            before = base + i
        masked = gl.maximum(begun, blind)
    if RIGHT or TAIL:
        for i in range(first + masked, first + full_lo):
            index = before if GROUPED else base + i - 1
            p, dp, dk, dv = late_step(CID, True, i, index, p, dp, dk, dv, rings, kv, slot, own, ds_ring, sums,
                                      edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
            before = base + i
    for i in range(first + gl.maximum(begun, full_lo), first + full_hi):
        index = before if GROUPED else base + i - 1
        p, dp, dk, dv = late_step(CID, False, i, index, p, dp, dk, dv, rings, kv, slot, own, ds_ring, sums,
                                  edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
        before = base + i
    if LEFT:
        for i in range(first + gl.maximum(begun, full_hi), first + hi):
            index = before if GROUPED else base + i - 1
            p, dp, dk, dv = late_step(CID, True, i, index, p, dp, dk, dv, rings, kv, slot, own, ds_ring, sums,
                                      edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
            before = base + i
    if not GROUPED:
        before = base + first + hi - 1
    return before, p, dp, dk, dv


@gluon.jit
def fused_consumer(CID: gl.constexpr, rings, kv, ds_tile, sums, schedule, sizes, band, maths, scale,
                   SHAPE: gl.constexpr, MASKS: gl.constexpr, ORDER: gl.constexpr, HOW: gl.constexpr,
                   GROUPED: gl.constexpr, TURNS: gl.constexpr):  # fmt: skip
    """Partitions 1 and 2: dK and dV of 64 keys of every key tile, in registers from its first step to its last."""
    k_tile, v_tile, k_full, v_full, finished = kv
    heads_kv, group, seq_q, seq_kv = sizes
    BM, BN, D, STAGES = SHAPE
    APART, DQ_LATE, LSE_FIRST, DV_LATE, RESIDENT, SOFTCAP, FIXED, HALVES = HOW
    dtype: gl.constexpr = k_tile.dtype
    count = block_count(schedule, ORDER)
    tile, row = block_at(0, schedule, ORDER)
    g = 0  # steps of the key tiles before
    for r in range(count):
        tile_next, row_next = block_at(gl.minimum(r + 1, count - 1), schedule, ORDER)
        place, walk = walk_of(tile, row, sizes, band, SHAPE, MASKS)
        steps = own_steps(CID, tile, walk, sizes, band, SHAPE, MASKS, SOFTCAP)
        n = walk[1]
        total = n * group if GROUPED else n
        slot = r % SLOTS
        dk = gl.zeros([64, D], gl.float32, acc_layout(D))
        dv = gl.zeros([64, D], gl.float32, acc_layout(D))
        own = (k_tile, v_tile)
        mbarrier.wait(k_full.index(slot), (r // SLOTS) & 1)
        edges = edges_before(edges_of(walk[0] * BM, tile * BN + CID * 64, (seq_q, seq_kv), band), g * BM)
        _batch, _head, _t, index = step_at(place, walk, 0, TURNS)
        base = index - g  # + i: the number of step i's query tile among all heads'
        if RESIDENT:
            own = (k_tile.index(slot).slice(CID * 64, 64, 0).load(gl.DotOperandLayout(0, acc_layout(BM), 2)), v_tile)
        if DQ_LATE:
            mbarrier.wait(v_full.index(slot), (r // SLOTS) & 1)
            if total > 0:
                BLIND: gl.constexpr = may_be_blind(CID, MASKS, GROUPED)
                p, dp, dv = late_start(
                    CID, BLIND, steps[0] > 0, g, dv, rings, kv, slot, own, edges, maths, MASKS, SHAPE, HOW
                )
                before = base + g
                if GROUPED:
                    for member in range(group):
                        first = member * n
                        before, p, dp, dk, dv = late_walk(
                            CID, g + first, gl.where(member == 0, 1, 0), base, before, p, dp, dk, dv, steps, rings, kv, slot, own,
                            ds_tile[0], sums, edges_before(edges, first * BM), maths, MASKS, SHAPE, HOW, True)  # fmt: skip
                        base += walk[2] + opaque_zero() - n  # reckoned here: no register holds it over the loops
                else:
                    before, p, dp, dk, dv = late_walk(CID, g, 1, base, before, p, dp, dk, dv, steps, rings, kv, slot, own,
                                                      ds_tile[0], sums, edges, maths, MASKS, SHAPE, HOW, False)  # fmt: skip
                dk = late_end(CID, g + total - 1, before, p, dp, dk, rings, kv, slot, ds_tile[0], sums, SHAPE, HOW)
        else:
            _place, next_walk = walk_of(tile_next, row_next, sizes, band, SHAPE, MASKS)
            end = g + total + gl.where((r + 1 < count) & (next_walk[1] > 0), 1, 0)
            s = warpgroup_mma_wait(
                0, deps=[issue_scores(CID, g, end, rings, k_tile, slot, own, SHAPE, LSE_FIRST, RESIDENT)])  # fmt: skip
            mbarrier.wait(v_full.index(slot), (r // SLOTS) & 1)
            if RESIDENT:
                own = (
                    own[0],
                    v_tile.index(slot).slice(CID * 64, 64, 0).load(gl.DotOperandLayout(0, acc_layout(BM), 2)),
                )
            if TURNS:
                blind, full_lo, full_hi, _n = steps
                steps = (blind * group, full_lo * group, full_hi * group, total)
                s, dk, dv = fused_walk(CID, g, group, base, s, dk, dv, end, steps, rings, kv, slot, own, ds_tile, sums,
                                       edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
            elif GROUPED:
                for member in range(group):
                    first = member * n
                    s, dk, dv = fused_walk(CID, g + first, None, base, s, dk, dv, end, steps, rings, kv, slot, own, ds_tile, sums,
                                           edges_before(edges, first * BM), maths, MASKS, SHAPE, HOW)  # fmt: skip
                    base += walk[2] - n
            else:
                s, dk, dv = fused_walk(CID, g, None, base, s, dk, dv, end, steps, rings, kv, slot, own, ds_tile, sums,
                                       edges, maths, MASKS, SHAPE, HOW)  # fmt: skip
        g += total
        if APART:
            if total > 0:
                everyone_sync(DONE)
        else:
            consumers_sync(DONE)
        if SOFTCAP:
            rows_used(D)
        half(v_tile, slot, CID, D).store(dv.to(dtype))
        half(k_tile, slot, CID, D).store((dk * scale).to(dtype))
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(finished.index(r % 2))
        tile = tile_next
        row = row_next


@gluon.jit
def additions_done():
    """Wait until TMA has carried out this thread's additions; tma_store_wait() waits until it has read what to add."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def dq_group(acc_desc, kv, ds_tile, sums, staging, schedule, sizes, band,
             SHAPE: gl.constexpr, MASKS: gl.constexpr, ORDER: gl.constexpr, TURNS: gl.constexpr, FIXED: gl.constexpr):  # fmt: skip
    """Partition 3, if dQ has a group of its own: dQ of every step, in parts of 64 x 64. TMA's additions, by way of shared
    memory, are the faster ones for who has the time."""
    k_tile, v_tile, k_full, v_full, finished = kv
    ds_ring, ds_free = ds_tile
    BM, BN, D, STAGES = SHAPE
    PARTS: gl.constexpr = BM * D // (64 * 64)
    count = block_count(schedule, ORDER)
    tile, row = block_at(0, schedule, ORDER)
    i = 0
    for r in range(count):
        tile_next, row_next = block_at(gl.minimum(r + 1, count - 1), schedule, ORDER)
        place, walk = walk_of(tile, row, sizes, band, SHAPE, MASKS)
        slot = r % SLOTS
        mbarrier.wait(k_full.index(slot), (r // SLOTS) & 1)
        total = walk[1] * walk[3]
        for step in range(total):
            _batch, _head, _t, index = step_at(place, walk, step, TURNS)
            c = i & 1
            pair_sync(HANDED + 2 * c)
            pair_sync(HANDED + 2 * c + 1)
            for part in gl.static_range(PARTS):
                factor = rows_factor(sums, index, part, 64, SHAPE, FIXED)
                token = issue_dq(part, ds_ring.index(c), k_tile.index(opaque_zero() + slot), 64, SHAPE)
                dq = warpgroup_mma_wait(0, deps=[token])
                if part == PARTS - 1:
                    mbarrier.arrive(ds_free.index(c))
                if FIXED:
                    add_dq(sums, index, part, dq, factor, SHAPE, FIXED)
                else:
                    buffer = staging.index(c if PARTS == 1 else part)
                    tma_store_wait(1)  # what was in this buffer has left it
                    group_barrier()
                    buffer.store(to_lanes(dq * factor).reshape([128, 32]))
                    fence_async_shared()
                    group_barrier()
                    tma_reduce_add(acc_desc, [(index * PARTS + part) * 128, 0], buffer)
            i += 1
        if total > 0:
            everyone_arrive(DONE)
        if ORDER == BY_HEADS:
            additions_done()
        tile = tile_next
        row = row_next
    tma_store_wait(0)


@gluon.jit
def program_tile(pid, tiles, rows, together):
    """(tile, row) of program pid: `together` of the `rows` (batch, head) pairs take turns, tile by tile."""
    chunk = pid // (tiles * together)
    size = gl.minimum(rows - chunk * together, together)
    rest = pid - chunk * tiles * together
    return rest // size, chunk * together + rest % size


@gluon.jit(do_not_specialize=["rows", "heads_kv", "group", "seq_q", "seq_kv", "left", "right", "together", "rounds"])
def gluon_gradients_fused(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, stats_desc, acc_desc, acc, factors, table,
    rows, heads_kv, group, seq_q, seq_kv, left, right, together, factor, cap, scale, rounds,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, GROUPED: gl.constexpr, SOFTCAP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, FIXED: gl.constexpr,
    APART: gl.constexpr, DQ_LATE: gl.constexpr, ORDER: gl.constexpr, LSE_FIRST: gl.constexpr, DV_LATE: gl.constexpr, RESIDENT: gl.constexpr,
):  # fmt: skip
    """dv = sum p^T dO, dk = sum ds^T Q of key tiles of 128, all query heads that share them, and dQ += ds K.

    dQ goes to acc, a tile after the other, each in the order in which threads hold it: in float32, or, with FIXED, each
    row times its factor, as 32-bit integers. With APART a group of its own computes it. Persistent: a program owns one
    key tile after the other. BY_HEADS adds to a row of dQ in one order: those of a head are one program's, and what adds to
    an element is always the same thread, or TMA, which is waited for.
    """
    dtype: gl.constexpr = q_desc.dtype
    L: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    T: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, D], L)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, D], L)
    k_tile = gl.allocate_shared_memory(dtype, [SLOTS, BN, D], L)
    v_tile = gl.allocate_shared_memory(dtype, [SLOTS, BN, D], L)
    stats_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BM], stats_desc.layout)
    ds_ring = gl.allocate_shared_memory(dtype, [2, BN, BM], L)
    staging = gl.allocate_shared_memory(gl.float32, [2, 128 if APART and not FIXED else 8, 32], T)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], B)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], B)
    finished = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(do_full.index(stage), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(ds_free.index(slot), count=1)
        mbarrier.init(finished.index(slot), count=2)
    fence_async_shared()

    band = (left, right)
    MASKS: gl.constexpr = (LEFT, RIGHT, TAIL)
    SHAPE: gl.constexpr = (BM, BN, D, STAGES)
    # ptxas finds registers for dQ's additions in halves where not much else wants them: that of 3.9 not with groups.
    HALVES: gl.constexpr = not (FIXED or LEFT or WHOLE or ORDER == BY_HEADS or (HASTY and GROUPED))
    HOW: gl.constexpr = (APART, DQ_LATE, LSE_FIRST, DV_LATE, RESIDENT, SOFTCAP, FIXED, HALVES)
    # Heads take turns step by step, in one walk, where that is faster: not with a full mask, nor where dQ is not apart.
    TURNS: gl.constexpr = GROUPED and APART and RIGHT
    schedule = (table, rounds, gl.cdiv(seq_kv, BN), rows, together)
    sizes = (heads_kv, group, seq_q, seq_kv)
    rings = (q_ring, do_ring, stats_ring, q_full, do_full)
    kv = (k_tile, v_tile, k_full, v_full, finished)
    ds_tile = (ds_ring, ds_free)
    sums = (acc, factors if FIXED else scale)
    if APART:
        gl.warp_specialize([
            (fused_producer, ((q_desc, do_desc, stats_desc), (k_desc, v_desc, dk_desc, dv_desc), rings, kv, schedule, sizes, band, SHAPE, MASKS, ORDER, TURNS)),
            (fused_consumer, (gl.constexpr(0), rings, kv, ds_tile, sums, schedule, sizes, band, (factor, cap), scale, SHAPE, MASKS, ORDER, HOW, GROUPED, TURNS)),
            (fused_consumer, (gl.constexpr(1), rings, kv, ds_tile, sums, schedule, sizes, band, (factor, cap), scale, SHAPE, MASKS, ORDER, HOW, GROUPED, TURNS)),
            (dq_group, (acc_desc, kv, ds_tile, sums, staging, schedule, sizes, band, SHAPE, MASKS, ORDER, TURNS, FIXED)),
        ], [4, 4, 4], [208, 208, 72])  # fmt: skip
    else:
        gl.warp_specialize([
            (fused_producer, ((q_desc, do_desc, stats_desc), (k_desc, v_desc, dk_desc, dv_desc), rings, kv, schedule, sizes, band, SHAPE, MASKS, ORDER, TURNS)),
            (fused_consumer, (gl.constexpr(0), rings, kv, ds_tile, sums, schedule, sizes, band, (factor, cap), scale, SHAPE, MASKS, ORDER, HOW, GROUPED, TURNS)),
            (fused_consumer, (gl.constexpr(1), rings, kv, ds_tile, sums, schedule, sizes, band, (factor, cap), scale, SHAPE, MASKS, ORDER, HOW, GROUPED, TURNS)),
        ], [4, 4], [240, 240])  # fmt: skip


# ---- dQ alone: a program owns 128 queries and walks over the keys


@gluon.jit
def q_producer(descs, q_tiles, rings, place, walk, SHAPE: gl.constexpr):
    """Partition 0: loads Q and dO once, K and V of every step; stores dQ."""
    q_desc, do_desc, k_desc, v_desc, dq_desc = descs
    q_tile, do_tile, q_full = q_tiles
    k_ring, v_ring, k_full, v_full = rings
    BN, D, K_STAGES, V_STAGES = SHAPE
    batch, head, head_kv, start_m = place
    lo, n = walk
    mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
    load_rows(q_desc, (batch, head), start_m, q_full.index(0), q_tile.index(0))
    load_rows(q_desc, (batch, head), start_m + 64, q_full.index(0), q_tile.index(1))
    for i in range(n):
        b = i % K_STAGES
        c = i % V_STAGES
        row = (lo + i) * BN
        if i >= K_STAGES:
            everyone_sync(FREE + b)
        mbarrier.expect(k_full.index(b), k_desc.block_type.nbytes)
        load_rows(k_desc, (batch, head_kv), row, k_full.index(b), k_ring.index(b))
        if i == 0:
            mbarrier.expect(q_full.index(1), 2 * do_desc.block_type.nbytes)
            load_rows(do_desc, (batch, head), start_m, q_full.index(1), do_tile.index(0))
            load_rows(do_desc, (batch, head), start_m + 64, q_full.index(1), do_tile.index(1))
        if i >= V_STAGES:
            everyone_sync(V_FREE + c)
        mbarrier.expect(v_full.index(c), v_desc.block_type.nbytes)
        load_rows(v_desc, (batch, head_kv), row, v_full.index(c), v_ring.index(c))
    everyone_sync(FINISHED)
    for part in gl.static_range(2):
        store_rows(dq_desc, (batch, head), start_m + part * 64, q_tile.index(part))
    tma_store_wait(0)


@gluon.jit
def q_step(CID: gl.constexpr, MASK: gl.constexpr, i, t, n, s, dq, delta, q_tiles, lse_tile, rings,
           edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """One key tile: dq += ds K. Returns the scores of the next step, and dq."""
    q_tile, do_tile, q_full = q_tiles
    k_ring, v_ring, k_full, v_full = rings
    BN, D, K_STAGES, V_STAGES = SHAPE
    dtype: gl.constexpr = q_tile.dtype
    L: gl.constexpr = acc_layout(BN)
    zeros = gl.zeros([64, BN], gl.float32, L)
    b = i % K_STAGES
    c = i % V_STAGES
    mbarrier.wait(v_full.index(c), (i // V_STAGES) & 1)
    do = do_tile.index(opaque_zero() + CID)
    dp_token = warpgroup_mma(do, v_ring.index(c).permute((1, 0)), zeros, use_acc=False, is_async=True)
    # Waits for nothing; with the load behind it, it keeps dP's wgmmas in front of the softmax: ptxas moves arithmetic
    # over a wait, but no load.
    s = warpgroup_mma_wait(1, deps=[s])
    lse = lse_tile.index(CID).load(gl.SliceLayout(1, L))
    p, slope = probabilities(s, lse, t * BN, edges, maths, False, MASK, MASKS, SOFTCAP)
    b2 = (i + 1) % K_STAGES
    # Here, because its branch pins the exponentials above the wait for dP.
    mbarrier.wait(k_full.index(b2), ((i + 1) // K_STAGES) & 1, pred=i + 1 < n)
    dp = warpgroup_mma_wait(0, deps=[dp_token])
    if i + V_STAGES < n:
        everyone_arrive(V_FREE + c)  # an mbarrier's arrival here makes ptxas pull the wait over the exponentials
    ds = a_operand(slope * (dp + delta[:, None]), D, dtype)
    dq_token = warpgroup_mma(ds, k_ring.index(b), dq, is_async=True)
    q = q_tile.index(opaque_zero() + CID)
    s_token = warpgroup_mma(q, k_ring.index(b2).permute((1, 0)), zeros, use_acc=False, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq_token])
    if i + K_STAGES < n:
        everyone_arrive(FREE + b)
    s = warpgroup_mma_wait(0, deps=[s_token])
    return s, dq


@gluon.jit
def q_consumer(CID: gl.constexpr, stats, q_tiles, lse_tile, rings, start_m, tiles, stats_row,
               lengths, band, maths, scale, MASKS: gl.constexpr, SHAPE: gl.constexpr, BM: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """Partitions 1 and 2: dQ of 64 queries each."""
    q_tile, do_tile, q_full = q_tiles
    k_ring, v_ring, k_full, v_full = rings
    BN, D, K_STAGES, V_STAGES = SHAPE
    LEFT, RIGHT, TAIL = MASKS
    lo, full_lo, full_hi, hi = tiles
    n = hi - lo
    L: gl.constexpr = acc_layout(BN)
    dtype: gl.constexpr = q_tile.dtype
    start_mine = start_m + CID * 64
    edges = edges_of(start_mine, 0, lengths, band)
    dq = gl.zeros([64, D], gl.float32, acc_layout(D))
    zeros = gl.zeros([64, BN], gl.float32, L)
    # Rows of 64 queries lie in one tile of BM statistics, lse first, -delta behind; past the last tile there is none.
    rows = gl.arange(0, 64, gl.SliceLayout(1, L))
    at = stats + stats_row.to(gl.int64) * 2 + start_mine // BM * (2 * BM) + start_mine % BM
    lse_tile.index(CID).store(gl.load(at + rows))
    delta = gl.load(at + BM + rows)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0, pred=n > 0)
    s = warpgroup_mma_wait(0, deps=[warpgroup_mma(
        q_tile.index(opaque_zero() + CID), k_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)])  # fmt: skip
    mbarrier.wait(q_full.index(1), 0, pred=n > 0)
    if LEFT:
        for t in range(lo, full_lo):
            s, dq = q_step(CID, True, t - lo, t, n, s, dq, delta, q_tiles, lse_tile, rings,
                           edges, maths, MASKS, SHAPE, SOFTCAP)  # fmt: skip
    for t in range(full_lo, full_hi):
        s, dq = q_step(CID, False, t - lo, t, n, s, dq, delta, q_tiles, lse_tile, rings,
                       edges, maths, MASKS, SHAPE, SOFTCAP)  # fmt: skip
    if RIGHT or TAIL:
        for t in range(full_hi, hi):
            s, dq = q_step(CID, True, t - lo, t, n, s, dq, delta, q_tiles, lse_tile, rings,
                           edges, maths, MASKS, SHAPE, SOFTCAP)  # fmt: skip
    q_tile.index(CID).store((dq * scale).to(dtype))  # only this consumer reads it
    fence_async_shared()
    everyone_arrive(FINISHED)


@gluon.jit(do_not_specialize=["rows", "heads", "group", "seq_q", "seq_kv", "left", "right", "together"])
def gluon_gradients_q(
    q_desc, k_desc, v_desc, do_desc, dq_desc, stats,
    rows, heads, group, seq_q, seq_kv, left, right, together, factor, cap, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, SOFTCAP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """dq = sum ds K of 128 queries of one head; BM is the tile of the statistics."""
    dtype: gl.constexpr = q_desc.dtype
    S: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    q_tile = gl.allocate_shared_memory(dtype, [2, 64, D], S)
    do_tile = gl.allocate_shared_memory(dtype, [2, 64, D], S)
    k_ring = gl.allocate_shared_memory(dtype, [K_STAGES, BN, D], S)
    v_ring = gl.allocate_shared_memory(dtype, [V_STAGES, BN, D], S)
    lse_tile = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], B)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], B)
    for j in gl.static_range(2):
        mbarrier.init(q_full.index(j), count=1)
    for j in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(j), count=1)
    for j in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(j), count=1)
    fence_async_shared()

    tile, row = program_tile(gl.program_id(0), gl.cdiv(seq_q, 128), rows, together)
    if RIGHT:
        tile = gl.cdiv(seq_q, 128) - 1 - tile  # the longest rows start first
    place = (row // heads, row % heads, row % heads // group, tile * 128)
    band = (left, right)
    MASKS: gl.constexpr = (LEFT, RIGHT, TAIL)
    SHAPE: gl.constexpr = (BN, D, K_STAGES, V_STAGES)
    tiles = key_range(tile * 128, seq_q, seq_kv, band, 128, BN, MASKS)
    q_tiles = (q_tile, do_tile, q_full)
    rings = (k_ring, v_ring, k_full, v_full)
    stats_row = row * gl.cdiv(seq_q, 128) * 128
    gl.warp_specialize([
        (q_producer, ((q_desc, do_desc, k_desc, v_desc, dq_desc), q_tiles, rings, place, (tiles[0], tiles[3] - tiles[0]), SHAPE)),
        (q_consumer, (gl.constexpr(0), stats, q_tiles, lse_tile, rings, tile * 128, tiles, stats_row, (seq_q, seq_kv), band, (factor, cap), scale, MASKS, SHAPE, BM, SOFTCAP)),
        (q_consumer, (gl.constexpr(1), stats, q_tiles, lse_tile, rings, tile * 128, tiles, stats_row, (seq_q, seq_kv), band, (factor, cap), scale, MASKS, SHAPE, BM, SOFTCAP)),
    ], [4, 4], [240, 240])  # fmt: skip


# ---- dK and dV at head_dim 256: a program owns 64 keys; consumer 1 owns S, P and dV, consumer 2 owns dP, dS and dK


@gluon.jit
def wide_producer(descs, kv_descs, rings, kv, place, walk, SHAPE: gl.constexpr):
    """Partition 0: loads K and V once, Q and dO and statistics of every step; stores dK and dV."""
    q_desc, do_desc, stats_desc = descs
    k_desc, v_desc, dk_desc, dv_desc = kv_descs
    q_ring, do_ring, stats_ring, q_full, do_full, q_free, do_free = rings
    k_tile, v_tile, k_full, v_full = kv
    D, STAGES, P_STAGES = SHAPE
    batch, head_kv, start_n = place
    lo, n, tiles, group, heads = walk
    head = head_kv * group
    mbarrier.expect(k_full.index(0), k_desc.block_type.nbytes)
    load_rows(k_desc, (batch, head_kv), start_n, k_full.index(0), k_tile.index(0))
    for i in range(n * group):
        b = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        member = i // n
        t = lo + i - member * n
        mbarrier.wait(q_free.index(b), phase)
        mbarrier.expect(q_full.index(b), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
        load_rows(q_desc, (batch, head + member), t * 64, q_full.index(b), q_ring.index(b))
        at = ((batch * heads + head + member) * tiles + t) * 128
        tma_load(stats_desc, [at], q_full.index(b), stats_ring.index(b))
        if i == 0:
            mbarrier.expect(v_full.index(0), v_desc.block_type.nbytes)
            load_rows(v_desc, (batch, head_kv), start_n, v_full.index(0), v_tile.index(0))
        mbarrier.wait(do_free.index(b), phase)
        mbarrier.expect(do_full.index(b), do_desc.block_type.nbytes)
        load_rows(do_desc, (batch, head + member), t * 64, do_full.index(b), do_ring.index(b))
    everyone_sync(FINISHED)
    store_rows(dv_desc, (batch, head_kv), start_n, k_tile.index(0))
    store_rows(dk_desc, (batch, head_kv), start_n, v_tile.index(0))
    tma_store_wait(0)


@gluon.jit
def wide_v_step(MASK: gl.constexpr, i, s, dv, total, rings, kv, hand_over,
                edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """dv += p^T dO of one query tile; p goes to the other consumer. Returns the scores of the next step, and dv."""
    q_ring, do_ring, stats_ring, q_full, do_full, q_free, do_free = rings
    k_tile, v_tile, k_full, v_full = kv
    p_ring, p_full, p_free = hand_over
    D, STAGES, P_STAGES = SHAPE
    dtype: gl.constexpr = q_ring.dtype
    L: gl.constexpr = acc_layout(64)
    b = i % STAGES
    c = i % P_STAGES
    lse = stats_ring.index(b).slice(0, 64, 0).load(gl.SliceLayout(0, L))
    p, slope = probabilities(s, lse, i * 64, edges, maths, True, MASK, MASKS, SOFTCAP)
    mbarrier.wait(do_full.index(b), (i // STAGES) & 1)
    dv_token = warpgroup_mma(a_operand(p, D, dtype), do_ring.index(b), dv, is_async=True)
    mbarrier.wait(p_free.index(c), ((i // P_STAGES) & 1) ^ 1)
    p_ring.index(c).store(to_lanes(slope))
    mbarrier.arrive(p_full.index(c))
    mbarrier.arrive(q_free.index(b))  # this consumer has used Q and the statistics of step i
    b2 = (i + 1) % STAGES
    mbarrier.wait(q_full.index(b2), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
    zeros = gl.zeros([64, 64], gl.float32, L)
    s_token = warpgroup_mma(
        k_tile.index(opaque_zero()), q_ring.index(b2).permute((1, 0)), zeros, use_acc=False, is_async=True)  # fmt: skip
    dv = warpgroup_mma_wait(1, deps=[dv_token])
    mbarrier.arrive(do_free.index(b))
    s = warpgroup_mma_wait(0, deps=[s_token])
    return s, dv


@gluon.jit
def wide_v_walk(first, s, dv, total, steps, rings, kv, hand_over,
                edges, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """One head, from step `first` on: `steps` end the masked tiles, the ones without a mask, and again masked ones."""
    full_lo, full_hi, hi = steps
    LEFT, RIGHT, TAIL = MASKS
    if RIGHT or TAIL:
        for i in range(first, first + full_lo):
            s, dv = wide_v_step(True, i, s, dv, total, rings, kv, hand_over, edges, maths, MASKS, SHAPE, SOFTCAP)
    for i in range(first + full_lo, first + full_hi):
        s, dv = wide_v_step(False, i, s, dv, total, rings, kv, hand_over, edges, maths, MASKS, SHAPE, SOFTCAP)
    if LEFT:
        for i in range(first + full_hi, first + hi):
            s, dv = wide_v_step(True, i, s, dv, total, rings, kv, hand_over, edges, maths, MASKS, SHAPE, SOFTCAP)
    return s, dv


@gluon.jit
def wide_v_consumer(rings, kv, hand_over, start_n, start_m, steps, group,
                    lengths, band, maths, MASKS: gl.constexpr, SHAPE: gl.constexpr, SOFTCAP: gl.constexpr, GROUPED: gl.constexpr):  # fmt: skip
    """Partition 1: scores, probabilities, dV."""
    q_ring, do_ring, stats_ring, q_full, do_full, q_free, do_free = rings
    k_tile, v_tile, k_full, v_full = kv
    D, STAGES, P_STAGES = SHAPE
    full_lo, full_hi, n = steps
    total = n * group if GROUPED else n
    zeros = gl.zeros([64, 64], gl.float32, acc_layout(64))
    dv = gl.zeros([64, D], gl.float32, acc_layout(D))
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    s = warpgroup_mma_wait(0, deps=[warpgroup_mma(
        k_tile.index(0), q_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)])  # fmt: skip
    edges = edges_of(start_m, start_n, lengths, band)
    if GROUPED:
        for member in range(group):
            first = member * n
            s, dv = wide_v_walk(first, s, dv, total, steps, rings, kv, hand_over,
                                edges_before(edges, first * 64), maths, MASKS, SHAPE, SOFTCAP)  # fmt: skip
    else:
        s, dv = wide_v_walk(0, s, dv, total, steps, rings, kv, hand_over, edges, maths, MASKS, SHAPE, SOFTCAP)
    k_tile.index(0).store(dv.to(k_tile.dtype))  # only this consumer reads K
    fence_async_shared()
    everyone_arrive(FINISHED)


@gluon.jit
def wide_k_consumer(rings, kv, hand_over, total, scale, SHAPE: gl.constexpr):
    """Partition 2: the gradients of the probabilities, dK. Masks are in the p that it gets."""
    q_ring, do_ring, stats_ring, q_full, do_full, q_free, do_free = rings
    k_tile, v_tile, k_full, v_full = kv
    p_ring, p_full, p_free = hand_over
    D, STAGES, P_STAGES = SHAPE
    dtype: gl.constexpr = q_ring.dtype
    L: gl.constexpr = acc_layout(64)
    zeros = gl.zeros([64, 64], gl.float32, L)
    dk = gl.zeros([64, D], gl.float32, acc_layout(D))
    mbarrier.wait(v_full.index(0), 0, pred=total > 0)
    mbarrier.wait(do_full.index(0), 0, pred=total > 0)
    dp = warpgroup_mma_wait(0, deps=[warpgroup_mma(
        v_tile.index(0), do_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)])  # fmt: skip
    mbarrier.arrive(do_free.index(0))
    for i in range(total):
        b = i % STAGES
        c = i % P_STAGES
        mbarrier.wait(q_full.index(b), (i // STAGES) & 1)
        delta = stats_ring.index(b).slice(64, 64, 0).load(gl.SliceLayout(0, L))
        mbarrier.wait(p_full.index(c), (i // P_STAGES) & 1)
        p = from_lanes(p_ring.index(c).load(lanes_layout(64)), 64)
        mbarrier.arrive(p_free.index(c))
        ds = a_operand(p * (dp + delta[None, :]), D, dtype)
        dk_token = warpgroup_mma(ds, q_ring.index(b), dk, is_async=True)
        b2 = (i + 1) % STAGES
        mbarrier.wait(do_full.index(b2), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        dp_token = warpgroup_mma(
            v_tile.index(opaque_zero()), do_ring.index(b2).permute((1, 0)), zeros, use_acc=False, is_async=True)  # fmt: skip
        dk = warpgroup_mma_wait(1, deps=[dk_token])
        mbarrier.arrive(q_free.index(b))
        dp = warpgroup_mma_wait(0, deps=[dp_token])
        mbarrier.arrive(do_free.index(b2), pred=i + 1 < total)
    v_tile.index(0).store((dk * scale).to(dtype))  # only this consumer reads V
    fence_async_shared()
    everyone_arrive(FINISHED)


@gluon.jit(do_not_specialize=["rows", "heads_kv", "group", "seq_q", "seq_kv", "left", "right", "together"])
def gluon_gradients_kv(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, stats_desc,
    rows, heads_kv, group, seq_q, seq_kv, left, right, together, factor, cap, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, GROUPED: gl.constexpr, SOFTCAP: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, P_STAGES: gl.constexpr,
):  # fmt: skip
    """dv = sum p^T dO and dk = sum ds^T Q of 64 keys, all query heads that share them; tiles of 64 queries."""
    dtype: gl.constexpr = q_desc.dtype
    S: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, D], S)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, D], S)
    k_tile = gl.allocate_shared_memory(dtype, [1, 64, D], S)
    v_tile = gl.allocate_shared_memory(dtype, [1, 64, D], S)
    p_ring = gl.allocate_shared_memory(gl.float32, [P_STAGES, 64 * 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    stats_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 128], stats_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    p_full = gl.allocate_shared_memory(gl.int64, [P_STAGES, 1], B)
    p_free = gl.allocate_shared_memory(gl.int64, [P_STAGES, 1], B)
    mbarrier.init(k_full.index(0), count=1)
    mbarrier.init(v_full.index(0), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(q_full.index(j), count=1)
        mbarrier.init(q_free.index(j), count=2)
        mbarrier.init(do_full.index(j), count=1)
        mbarrier.init(do_free.index(j), count=2)
    for j in gl.static_range(P_STAGES):
        mbarrier.init(p_full.index(j), count=1)
        mbarrier.init(p_free.index(j), count=1)
    fence_async_shared()

    tile, row = program_tile(gl.program_id(0), gl.cdiv(seq_kv, 64), rows, together)
    place = (row // heads_kv, row % heads_kv, tile * 64)
    band = (left, right)
    MASKS: gl.constexpr = (LEFT, RIGHT, TAIL)
    SHAPE: gl.constexpr = (D, STAGES, P_STAGES)
    lo, full_lo, full_hi, hi = query_range(tile * 64, seq_q, seq_kv, band, 64, 64, MASKS)
    n = hi - lo
    walk = (lo, n, gl.cdiv(seq_q, 128) * 2, group, heads_kv * group)  # statistics: multiples of 128 queries
    rings = (q_ring, do_ring, stats_ring, q_full, do_full, q_free, do_free)
    kv = (k_tile, v_tile, k_full, v_full)
    hand_over = (p_ring, p_full, p_free)
    gl.warp_specialize([
        (wide_producer, ((q_desc, do_desc, stats_desc), (k_desc, v_desc, dk_desc, dv_desc), rings, kv, place, walk, SHAPE)),
        (wide_v_consumer, (rings, kv, hand_over, tile * 64, lo * 64, (full_lo - lo, full_hi - lo, n), group, (seq_q, seq_kv), band, (factor, cap), MASKS, SHAPE, SOFTCAP, GROUPED)),
        (wide_k_consumer, (rings, kv, hand_over, n * group if GROUPED else n, scale, SHAPE)),
    ], [4, 4], [240, 240])  # fmt: skip


# ---- before and after


@triton.jit
def norms(x):
    """An upper bound, rarely more than the length, of each row's length; NaN and Inf stay what they are."""
    squares = tl.sum(x * x, 1)
    sums = tl.sum(tl.abs(x), 1)  # no less, but it neither overflows nor vanishes where squares do
    return tl.where(squares > 2.0**-60, tl.minimum(tl.sqrt(squares), sums), sums)


@triton.jit
def largest(x):
    """The largest of numbers that are not negative; NaN counts as larger than all."""
    return tl.max(x.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["heads_kv", "seq_kv", "head_dim", "share"])
def gluon_largest(
    k, v, out, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, heads_kv, seq_kv, head_dim, share,
    CHUNKS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(CHUNKS, 2) for each head of keys: the largest |k| and the largest length of a v, of `share` rows each."""
    pid = tl.program_id(0)
    pair = pid // CHUNKS
    batch = (pair // heads_kv).to(tl.int64)
    head = (pair % heads_kv).to(tl.int64)
    begin = pid % CHUNKS * share
    end = tl.minimum(begin + share, seq_kv)
    cols = tl.arange(0, D)
    most_k = tl.zeros([ROWS], tl.float32)
    most_v = tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        there = (rows[:, None] < end) & (cols[None, :] < head_dim)
        at = rows.to(tl.int64)[:, None]
        k_tile = tl.load(
            k + batch * stride_kb + head * stride_kh + at * stride_kn + cols[None, :], mask=there, other=0.0
        )
        v_tile = tl.load(
            v + batch * stride_vb + head * stride_vh + at * stride_vn + cols[None, :], mask=there, other=0.0
        )
        size = tl.abs(k_tile.to(tl.float32)).to(tl.int32, bitcast=True)  # as integers: a NaN is not lost
        most_k = tl.maximum(most_k.to(tl.int32, bitcast=True), tl.max(size, 1)).to(tl.float32, bitcast=True)
        length = norms(v_tile.to(tl.float32)).to(tl.int32, bitcast=True)
        most_v = tl.maximum(most_v.to(tl.int32, bitcast=True), length).to(tl.float32, bitcast=True)
    tl.store(out + 2 * pid, largest(most_k))
    tl.store(out + 2 * pid + 1, largest(most_v))


@triton.jit(do_not_specialize=["heads", "group", "seq_q", "rows_padded", "head_dim"])
def gluon_row_statistics(
    o, do, lse, stats, acc, factors, most,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, heads, group, seq_q, rows_padded, head_dim, factor,
    EVEN: tl.constexpr, ZERO: tl.constexpr, FIXED: tl.constexpr, CHUNKS: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per tile of BM queries: factor * lse, then -delta = -rowsum(o dO). Zeroes these rows of dQ's accumulator.

    factor is log2(e), or what makes of lse a value that s can begin with. lse is +inf where there is no row and where a row saw no key: exp2(s - lse) is 0 there, without a mask.

    FIXED: also what a row of dQ / scale is multiplied with to be a 32-bit integer. It is a sum of ds k, and
    |ds| = p |dO (v - o)| <= 2 p |dO| max |v|, so that none of its parts exceeds 2 |dO| max |v| max |k|.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the next kernel begins with what is written last, in the L2 cache
    blocks = rows_padded // ROWS
    head_row = pid // blocks
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)
    rows = pid % blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    o_at = o + batch * stride_ob + head * stride_oh + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    g_at = do + batch * stride_gb + head * stride_gh + rows.to(tl.int64)[:, None] * stride_gm + cols[None, :]
    lse_at = lse + head_row.to(tl.int64) * seq_q + rows
    if EVEN:
        o_tile = tl.load(o_at).to(tl.float32)
        g_tile = tl.load(g_at).to(tl.float32)
        lse_row = tl.load(lse_at)
    else:
        there = (rows[:, None] < seq_q) & (cols[None, :] < head_dim)
        o_tile = tl.load(o_at, mask=there, other=0.0).to(tl.float32)
        g_tile = tl.load(g_at, mask=there, other=0.0).to(tl.float32)
        lse_row = tl.load(lse_at, mask=rows < seq_q, other=-float("inf"))
    lse_row = tl.where(lse_row == -float("inf"), float("inf"), lse_row) * factor
    out = stats + head_row.to(tl.int64) * rows_padded * 2 + rows // BM * (2 * BM) + rows % BM
    tl.store(out, lse_row)
    tl.store(out + BM, -tl.sum(o_tile * g_tile, 1))
    if FIXED:
        found = most + 2 * CHUNKS * (head_row // group).to(tl.int64) + 2 * tl.arange(0, CHUNKS)
        bits = 29.0 - tl.log2(largest(tl.load(found))) - tl.log2(largest(tl.load(found + 1))) - tl.log2(norms(g_tile))
        bits = tl.where(bits > 100.0, 100.0, tl.floor(bits))  # where dO, K or V is zero, dQ is; NaN stays
        tl.store(factors + head_row.to(tl.int64) * rows_padded + rows, tl.exp2(bits))
    if ZERO:
        if FIXED:
            tl.store(
                acc + pid.to(tl.int64) * (ROWS * D // 2) + tl.arange(0, ROWS * D // 2),
                tl.zeros([ROWS * D // 2], tl.int64),
            )
        else:
            tl.store(acc + pid.to(tl.int64) * (ROWS * D) + tl.arange(0, ROWS * D), tl.zeros([ROWS * D], tl.float32))


@triton.jit(do_not_specialize=["heads", "seq_q", "tiles", "head_dim"])
def gluon_round_dq(
    dq, acc, factors, stride_b, stride_h, stride_m, heads, seq_q, tiles, head_dim, scale,
    EVEN: tl.constexpr, FIXED: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One part, 64 x N, of one query tile of dQ: from the order in which threads held it to rows, scaled, rounded."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what was added up last may still lie in the L2 cache
    PARTS: tl.constexpr = BM * D // (64 * N)
    head_row = pid // (PARTS * tiles)
    tile = pid // PARTS % tiles
    if BM == 64:
        row = tile * 64
        col = pid % PARTS * N
    else:
        row = tile * 128 + pid % PARTS * 64
        col = 0
    rows = row + tl.arange(0, 64)
    cols = col + tl.arange(0, N)
    if FIXED:
        both = tl.load(acc + pid.to(tl.int64) * (32 * N) + tl.arange(0, 32 * N))
        low = both.to(tl.int32)
        high = ((both - low) >> 32).to(tl.int32)
        x = tl.join(low, high).reshape(4, N // 8, 2, 8, 4, 2).permute(0, 2, 3, 1, 4, 5).reshape(64, N)
        factor = tl.load(factors + head_row.to(tl.int64) * (tiles * BM) + rows)
        x = x.to(tl.float32) * (scale / factor)[:, None]  # a factor of 0 or NaN: a row that Inf or NaN is in
    else:
        x = tl.load(acc + pid.to(tl.int64) * (64 * N) + tl.arange(0, 64 * N))
        x = x.reshape(4, N // 8, 8, 4, 2, 2).permute(0, 4, 2, 1, 3, 5).reshape(64, N) * scale
    x = x.to(dq.dtype.element_ty)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)
    at = dq + batch * stride_b + head * stride_h + rows.to(tl.int64)[:, None] * stride_m + cols[None, :]
    if EVEN:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(rows[:, None] < seq_q) & (cols[None, :] < head_dim))
