"""From validated tensors to the launched backward kernels. A call's layout is planned once; a repeated call launches."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch

from flash2.backends.gluon_hopper import backward, launch
from flash2.backends.gluon_hopper.compat import TensorDescriptor, gl
from flash2.backends.gluon_hopper.configs import block_d
from flash2.backends.gluon_hopper.launch import LOG2E, empty_like, layout, readable, remember
from flash2.core.contract import TORCH_DTYPES, Spec, spec_of
from flash2.core.problem import Problem

TILE = 128  # queries: statistics and the accumulator of dQ are padded to whole ones
WAVES = 2  # tiles a multiprocessor of heads whose tiles take turns, where tiles are uneven
TOGETHER = 16  # such heads at most, of the kernels that have no plan
PER_TILE = 3.0  # what a key tile costs beside its steps, in steps
CHUNKS = 32  # programs that look for the largest of a head's keys and values
# Bytes of Q, dO and dQ's accumulator of those heads: twice what is in use at a time, for short tiles see half of it.
L2_SHARE = 64 << 20
HEADS_SHARE = 40 << 20  # of the same, of as many heads as there are multiprocessors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the gradients are computed. Fused: five products, dQ added up in global memory; else two kernels and seven.

    block_m, stages: queries a tile, and tiles in flight, of the kernel that owns keys. lse_first: the accumulator
    of S begins with -lse. dv_late: dV's product begins behind dS.
    Fused: fixed: dQ is added up in fixed point, the same in any order; by_heads: in float32, in one order, since one
    program owns all keys of a head; apart: dQ is computed by a third group; dq_late: a step later, beside the softmax;
    resident_kv: K and V are register operands.
    block_n, k_stages, v_stages: keys a tile, and tiles in flight, of the kernel that owns queries. together: how many
    heads' tiles take turns in the grid; 0: 1, or a few where a causal mask makes tiles uneven.
    """

    fused: bool
    block_m: int
    stages: int = 2
    lse_first: bool = False
    dv_late: bool = False
    fixed: bool = False
    by_heads: bool = False
    apart: bool = False
    dq_late: bool = False
    resident_kv: bool = False
    block_n: int = 64
    k_stages: int = 2
    v_stages: int = 2
    together: int = 0

    def __str__(self) -> str:
        if not self.fused:
            return f"two kernels, tiles of {self.block_m} queries and {self.block_n} keys: deterministic"
        names = {
            "lse_first": "lse first", "dv_late": "dV late", "apart": "dQ apart", "dq_late": "dQ late",
            "resident_kv": "K and V resident",
        }  # fmt: skip
        how = [f"{self.block_m}x128 s{self.stages}", *(name for field, name in names.items() if getattr(self, field))]
        sums = "float32 atomics: not deterministic"
        if self.fixed or self.by_heads:
            sums = f"{'fixed point' if self.fixed else 'float32, a head by one program'}: deterministic"
        return f"fused, {' '.join(how)}, dQ by {sums}"


def choose(block_d: int, softcap: bool, deterministic: bool, by_heads: bool = False) -> Config:
    """The configuration for a head_dim padded to block_d; by_heads: the deterministic one of whole_heads(). A softcap's
    slope takes registers: its tiles are smaller."""
    if block_d == 256:  # dK, dV and dQ of one tile do not fit together: the deterministic way is the fast one
        return Config(fused=False, block_m=64, block_n=32 if softcap else 64, v_stages=1)
    by_heads = deterministic and by_heads
    fused = functools.partial(Config, fused=True, fixed=deterministic and not by_heads, by_heads=by_heads, block_m=64)
    if softcap:
        return fused()
    if block_d == 128:
        return fused(lse_first=True, dq_late=True)
    return fused(stages=3, lse_first=True, apart=True, resident_kv=True, dv_late=True)


def chosen(spec: Spec, q_shape: torch.Size | tuple, k_shape: torch.Size | tuple, deterministic: bool, device) -> Config:
    """The configuration of a backward."""
    (batch, heads, seq_q, head_dim), (_, heads_kv, seq_kv, _) = q_shape, k_shape
    d, blocks = block_d(head_dim), launch.multiprocessors(device)
    by_heads = not windowed(spec, seq_kv) and whole_heads(
        batch * heads_kv, walked_bytes(heads // heads_kv, seq_q, d), blocks
    )
    return choose(d, spec.softcap != 0, deterministic, by_heads)


def windowed(spec: Spec, seq_kv: int) -> bool:
    """Does a window hide keys on the left?"""
    left = spec.band[0]
    return left is not None and left < seq_kv - 1


def walked_bytes(group: int, seq_q: int, d: int) -> int:
    """Of Q, dO and dQ's sums of the `group` heads that share keys: what is walked over for each key tile."""
    return group * seq_q * d * 8


def whole_heads(pairs: int, nbytes: int, blocks: int) -> bool:
    """Can each of `blocks` programs own all keys of one of `pairs` heads, and be as fast? nbytes: walked_bytes().

    All programs walk over theirs at once, once for each key tile: that should not be device memory's work.
    """
    return pairs >= blocks and blocks * nbytes <= HEADS_SHARE


def differentiate(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    spec: Spec, *, deterministic: bool = False, config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of q, k, v (batch, heads, seq, head_dim), fp16 or bf16, any strides; lse float32, natural log.

    What TMA cannot describe (a stride of 0 or of no multiple of 16 bytes, an unaligned address) is copied first. With
    `deterministic` the results are bitwise reproducible; head_dim above 128 has no other way. `config` overrules the
    choice.
    """
    do, q, k, v, lse = readable(do), readable(q), readable(k), readable(v), lse.contiguous()
    o = o if o.stride(3) == 1 or o.shape[3] == 1 else o.contiguous()
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    call_key = (
        "bwd", layout(do), layout(q), layout(k), layout(v), layout(o), lse.data_ptr() % 16, dq.stride(), dk.stride(),
        dv.stride(), q.dtype, q.get_device(), spec.scale, spec.causal, spec.window, spec.softcap, deterministic, config,
    )  # fmt: skip
    plan = launch._plans.get(call_key)
    if plan is None:
        plan = remember(call_key, plan_backward(do, q, k, v, o, dq, dk, dv, spec, deterministic, config))
    for step, arguments in plan.steps(do, q, k, v, o, lse, dq, dk, dv, plan.scratch(q.device)):
        step(*arguments)
    return dq, dk, dv


class Scratch(NamedTuple):
    """float32 but for acc: row statistics, dQ's accumulator; for fixed point row factors and the largest keys and values.

    What a kernel does not use is any tensor.
    """

    stats: torch.Tensor
    acc: torch.Tensor
    factors: torch.Tensor
    largest: torch.Tensor


class Plan(NamedTuple):
    """The launches of one backward, in their order."""

    how: Config
    width: int  # the head_dim that the kernels compute with
    rows: int  # of queries, of all heads, padded
    pairs: int  # heads of keys
    table: torch.Tensor | None  # the order of the key tiles
    maxima: Launch | None
    statistics: Launch
    kv: Launch
    q: Launch

    def scratch(self, device: torch.device) -> Scratch:
        """Memory that one backward needs beside its results."""
        stats = torch.empty(2 * self.rows, dtype=torch.float32, device=device)
        if not self.how.fused:
            return Scratch(stats, stats, stats, stats)
        if not self.how.fixed:
            return Scratch(stats, torch.empty(self.rows * self.width, dtype=torch.float32, device=device), stats, stats)
        acc = torch.empty(self.rows * self.width // 2, dtype=torch.int64, device=device)
        factors = torch.empty(self.rows + 2 * CHUNKS * self.pairs, dtype=torch.float32, device=device)
        return Scratch(stats, acc, factors, factors[self.rows :])

    def steps(self, do, q, k, v, o, lse, dq, dk, dv, scratch: Scratch) -> list[tuple[Launch, tuple]]:
        """(launch, its tensors) in their order."""
        stats, acc, factors, largest = scratch
        owned_keys = (q, k, v, do, dk, dv, stats)
        if self.how.fused:
            owned_keys += (
                acc if self.how.fixed else acc.view(-1, 32),
                acc,
                factors,
                stats if self.table is None else self.table,
            )
        found = [(self.maxima, (k, v, largest))] if self.maxima else []
        return [
            *found,
            (self.statistics, (o, do, lse, stats, acc, factors, largest)),
            (self.kv, owned_keys),
            (self.q, (dq, acc, factors) if self.how.fused else (q, k, v, do, dq, stats)),
        ]


def plan_backward(do, q, k, v, o, dq, dk, dv, spec: Spec, deterministic: bool, config: Config | None = None) -> Plan:
    """The launches for tensors laid out like these."""
    batch, heads, seq_q, head_dim = q.shape
    heads_kv, seq_kv = k.shape[1:3]
    group, d = heads // heads_kv, block_d(head_dim)
    left, right = spec.band
    LEFT = windowed(spec, seq_kv)
    RIGHT = right is not None and right < seq_q - 1
    how = config or chosen(spec, q.shape, k.shape, deterministic, q.device)
    factor, cap = spec.scale * LOG2E, 0.0
    if spec.softcap:
        factor, cap = 2 * spec.scale * LOG2E / spec.softcap, spec.softcap * LOG2E
    # Past these scales -lse / scale could not be added to q.k without loss.
    lse_first = how.lse_first and not spec.softcap and 2**-10 <= abs(spec.scale) <= 2**10
    padded = -(-seq_q // TILE) * TILE
    rows = batch * heads
    m = how.block_m
    even = seq_q == padded and head_dim == d
    tiles, pairs = -(-seq_kv // 128), batch * heads_kv
    together = how.together
    if not together:
        most = WAVES * launch.multiprocessors(q.device) // tiles if how.fused else TOGETHER
        together = heads_together(min(most, L2_SHARE // walked_bytes(group, seq_q, d)), RIGHT and not LEFT, pairs)
    sizes = (group, seq_q, seq_kv, left if LEFT else 0, right if RIGHT else 0, together, factor, cap, spec.scale)
    features = {"LEFT": LEFT, "RIGHT": RIGHT, "SOFTCAP": spec.softcap != 0}

    per_program = 4096 // d  # rows
    maxima, table = None, None
    if how.fixed:
        maxima = Launch(
            backward.gluon_largest, (pairs * CHUNKS,), (None,) * 3,
            (*k.stride()[:3], *v.stride()[:3], heads_kv, seq_kv, head_dim, -(-seq_kv // CHUNKS)),
            {"CHUNKS": CHUNKS, "D": d, "ROWS": per_program},
        )  # fmt: skip
    statistics = Launch(
        backward.gluon_row_statistics, (rows * (padded // per_program),), (None,) * 7,
        (*o.stride()[:3], *do.stride()[:3], heads, group, seq_q, padded, head_dim,
         -1.0 / spec.scale if lse_first else LOG2E),
        {"EVEN": even, "ZERO": how.fused, "FIXED": how.fixed, "CHUNKS": CHUNKS, "BM": m, "D": d, "ROWS": per_program},
    )  # fmt: skip
    tail = seq_kv % (128 if how.fused else 64) != 0
    constants = dict(features, D=d, TAIL=tail, GROUPED=group > 1, STAGES=how.stages)
    if how.fused:
        programs = min(tiles * pairs, launch.multiprocessors(q.device))
        rounds, order = 0, backward.BY_HEADS
        if not how.by_heads:
            work = [
                steps(128 * j, m, seq_q, seq_kv, left if LEFT else None, right if RIGHT else None) for j in range(tiles)
            ]
            table, rounds = launch.planned([group * n + PER_TILE for n in work], pairs, programs, together, q.device)
            order = backward.IN_TURNS if table is None else backward.PLANNED
        kv = Launch(
            backward.gluon_gradients_fused, (programs,),
            ((m, d), (128, d), (128, d), (m, d), (64, d), (64, d), (2 * m,), None if how.fixed else (128, 32), None, None, None),
            (pairs, heads_kv, *sizes, rounds),
            dict(constants, BM=m, BN=128, FIXED=how.fixed, APART=how.apart, DQ_LATE=how.dq_late,
                 ORDER=order.value, LSE_FIRST=lse_first, DV_LATE=how.dv_late,
                 RESIDENT=how.resident_kv),
        )  # fmt: skip
        columns = 64 if how.apart else d * m // 128  # of the parts, of 64 rows, in which dQ is added up
        gradients_q = Launch(
            backward.gluon_round_dq, (rows * padded * d // (64 * columns),), (None, None, None),
            (*dq.stride()[:3], heads, seq_q, padded // m, head_dim, spec.scale if how.fixed else 1.0),
            {"EVEN": even, "FIXED": how.fixed, "BM": m, "D": d, "N": columns},
        )  # fmt: skip
    else:
        kv = Launch(
            backward.gluon_gradients_kv, (pairs * -(-seq_kv // 64),), (*((64, d),) * 6, (2 * m,)),
            (pairs, heads_kv, *sizes), dict(constants, P_STAGES=2),
        )  # fmt: skip
        n = how.block_n
        gradients_q = Launch(
            backward.gluon_gradients_q, (rows * (padded // TILE),), ((64, d), (n, d), (n, d), (64, d), (64, d), None),
            (rows, heads, *sizes),
            dict(features, TAIL=seq_kv % n != 0, D=d, BM=m, BN=n, K_STAGES=how.k_stages, V_STAGES=how.v_stages),
        )  # fmt: skip
    return Plan(how, d, rows * padded, pairs, table, maxima, statistics, kv, gradients_q)


def steps(start_n: int, m: int, seq_q: int, seq_kv: int, left: int | None, right: int | None) -> int:
    """How many query tiles of m see a key of start_n..; backward.query_range() in Python."""
    offset, last = seq_kv - seq_q, min(start_n + 128, seq_kv) - 1
    hi = -(-seq_q // m)
    lo = 0 if right is None else min(max(start_n - offset - right, 0) // m, hi)
    return hi - lo if left is None else max(0, min(hi, -(-max(last + left - offset + 1, 0) // m)) - lo)


def heads_together(most: int, uneven: bool, pairs: int) -> int:
    """How many of `pairs` heads' tiles take turns in the grid, at most.

    Where tiles are uneven, the longest of a few heads start before the short ones of any. All groups are of about one
    size: of a last one with a head or two there are too few tiles to go round, and the longest of them is what the
    others wait for.
    """
    if not uneven:
        return 1
    groups = -(-pairs // max(1, most))
    return -(-pairs // groups)


class Launch(launch.Launch):
    """A launch whose tensors may be float32 scratch, moved linearly: tiles of (n,), or (n, 32) for the accumulator."""

    __slots__ = ()

    @staticmethod
    def describe(x: torch.Tensor, tile: tuple[int, ...]) -> TensorDescriptor:
        """The descriptor that moves `tile` of x at once."""
        if x.dim() == 4:
            return launch.descriptor(x, *tile)
        swizzle = 128 if x.dim() == 2 else 0
        shared = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=32, rank=x.dim())
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(tile), shared)


def chosen_for(problem: Problem, deterministic: bool) -> Config:
    """chosen() without tensors, on an H200."""
    q_shape = (problem.batch, problem.heads_q, problem.seq_q, problem.head_dim)
    k_shape = (problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim)
    return chosen(spec_of(problem), q_shape, k_shape, deterministic, torch.device("meta"))


def described(problem: Problem, deterministic: bool = False) -> list[str]:
    """How the gradients of `problem` are computed, for `explain`."""
    return [f"bwd: {chosen_for(problem, deterministic)}"]


def scratch_bytes(problem: Problem, deterministic: bool = False) -> int:
    """Device memory a backward takes beyond inputs and outputs: Scratch."""
    rows, d = problem.batch * problem.heads_q * -(-problem.seq_q // TILE) * TILE, block_d(problem.head_dim)
    how = chosen_for(problem, deterministic)
    acc = rows * d if how.fused else 0
    factors = rows + 2 * CHUNKS * problem.batch * problem.heads_kv if how.fixed else 0
    return 4 * (2 * rows + acc + factors)


def planned(problem: Problem, deterministic: bool, config: Config | None = None) -> dict[str, tuple[Launch, tuple]]:
    """kernel -> (its launch, its tensors), for tensors that hold nothing: to build them without a GPU."""
    dtype = TORCH_DTYPES[problem.dtype]
    with torch.device("meta"):
        q = readable(torch.empty(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype))
        k = readable(torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype))
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        plan = plan_backward(q, q, k, k, q, q, k, k, spec_of(problem), deterministic, config)
        found = plan.steps(q, q, k, k, q, lse, q, k, k, plan.scratch(q.device))
    return dict(zip(("maxima", "statistics", "kv", "q")[-len(found) :], found, strict=True))
