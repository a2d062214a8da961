"""From validated tensors to the launched backward kernels. A call's layout is planned once; a repeated call launches."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from flash2.backends.gluon_hopper import backward, launch
from flash2.backends.gluon_hopper.compat import TensorDescriptor, gl
from flash2.backends.gluon_hopper.configs import block_d
from flash2.backends.gluon_hopper.launch import LOG2E, empty_like, layout, readable, remember
from flash2.core.contract import TORCH_DTYPES, Spec, spec_of
from flash2.core.problem import Problem

TILE = 128  # queries: statistics and the accumulator of dQ are padded to whole ones
TOGETHER = 16  # heads whose tiles take turns where tiles are uneven
PER_TILE = 3.0  # what a key tile costs beside its steps, in steps
SHARED = 227 << 10  # bytes of shared memory a block may have
L2_SHARE = 40 << 20  # of 50 MB: bytes of Q, dO and dQ's accumulator in use at a time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the gradients are computed. Fused: five products, dQ added up in float32; else two kernels and seven products.

    block_m, stages: queries a tile, and tiles in flight, of the kernel that owns keys. early: dP is issued wholly
    before the softmax. lse_first: the accumulator of S begins with -lse. dv_late: dV's product begins behind dS.
    Fused: apart: dQ is computed by a third group; dq_late: a step later, beside the softmax.
    block_n, k_stages, v_stages: keys a tile, and tiles in flight, of the kernel that owns queries. resident_q:
    Q and dO are register operands there; resident_kv: K and V, in the kernel that owns keys. together: how many
    heads' tiles take turns in the grid; 0: 1, or a few where a causal mask makes tiles uneven.
    """

    fused: bool
    block_m: int
    stages: int = 2
    early: bool = False
    lse_first: bool = False
    dv_late: bool = False
    apart: bool = False
    dq_late: bool = False
    block_n: int = 64
    k_stages: int = 2
    v_stages: int = 2
    resident_q: bool = False
    resident_kv: bool = False
    together: int = 0

    def __str__(self) -> str:
        resident = f"{' Q and dO resident' * self.resident_q}{' K and V resident' * self.resident_kv}"
        first = " lse first" * self.lse_first
        if self.fused:
            how = f"{self.block_m}x128 s{self.stages}{' early' * self.early}{first}{' dV late' * self.dv_late}{' dQ apart' * self.apart}{' dQ late' * self.dq_late}"
            return f"fused, {how}{resident}, dQ by float32 atomics: not deterministic"
        return f"two kernels, tiles of {self.block_m} queries and {self.block_n} keys{first}{resident}: deterministic"


def choose(block_d: int, softcap: bool, deterministic: bool, causal: bool = False) -> Config:
    """The configuration for a head_dim padded to block_d. A softcap's slope takes registers: its tiles are smaller."""
    if block_d == 256:  # dK, dV and dQ of one tile do not fit together: the deterministic way is the fast one
        return Config(fused=False, block_m=64, block_n=32 if softcap else 64, v_stages=1)
    if block_d == 128:
        if deterministic:
            return Config(fused=False, block_m=64, stages=3, early=True)
        late = not softcap
        return Config(fused=True, block_m=64, lse_first=late, early=late, dq_late=late)
    if deterministic:
        block_m = 64 if softcap else 128
        return Config(fused=False, block_m=block_m, early=True, block_n=block_m, lse_first=not causal)
    if softcap:
        return Config(fused=True, block_m=64)
    return Config(fused=True, block_m=64, stages=3, lse_first=True, apart=True, resident_kv=True, dv_late=True)


def differentiate(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    spec: Spec, *, deterministic: bool = False, config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of q, k, v (batch, heads, seq, head_dim), fp16 or bf16, any strides; lse float32, natural log.

    What TMA cannot describe (a stride of 0 or of no multiple of 16 bytes, an unaligned address) is copied first. With
    `deterministic` every sum has one fixed order; head_dim above 128 has no other way. `config` overrules the choice.
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
    stats = torch.empty(plan.stats_size, dtype=torch.float32, device=q.device)
    acc = stats.view(-1, 32)
    if plan.fused:
        acc = torch.empty((plan.stats_size * plan.width // 64, 32), dtype=torch.float32, device=q.device)
    for step, arguments in plan.steps(do, q, k, v, o, lse, dq, dk, dv, stats, acc):
        step(*arguments)
    return dq, dk, dv


class Plan(NamedTuple):
    """The launches of one backward, in their order."""

    fused: bool
    width: int  # the head_dim that the kernels compute with
    stats_size: int  # float32: two numbers a query, padded
    table: torch.Tensor | None  # the order of the key tiles
    statistics: Launch
    kv: Launch
    q: Launch

    def steps(self, do, q, k, v, o, lse, dq, dk, dv, stats, acc) -> tuple:
        """(launch, its tensors) in their order; acc is dQ's accumulator, or anything if not fused."""
        owned_keys = (q, k, v, do, dk, dv, stats)
        return (
            (self.statistics, (o, do, lse, stats, acc)),
            (
                self.kv,
                owned_keys if self.width == 256 else (*owned_keys, acc, stats if self.table is None else self.table),
            ),
            (self.q, (dq, acc) if self.fused else (q, k, v, do, dq, stats)),
        )


def plan_backward(do, q, k, v, o, dq, dk, dv, spec: Spec, deterministic: bool, config: Config | None = None) -> Plan:
    """The launches for tensors laid out like these."""
    batch, heads, seq_q, head_dim = q.shape
    heads_kv, seq_kv = k.shape[1:3]
    group, d = heads // heads_kv, block_d(head_dim)
    left, right = spec.band
    LEFT = left is not None and left < seq_kv - 1  # else it hides nothing
    RIGHT = right is not None and right < seq_q - 1
    how = config or choose(d, spec.softcap != 0, deterministic, RIGHT)
    factor, cap = spec.scale * LOG2E, 0.0
    if spec.softcap:
        factor, cap = 2 * spec.scale * LOG2E / spec.softcap, spec.softcap * LOG2E
    # Past these scales -lse / scale could not be added to q.k without loss.
    lse_first = how.lse_first and not spec.softcap and 2**-10 <= abs(spec.scale) <= 2**10
    padded = -(-seq_q // TILE) * TILE
    rows = batch * heads
    m = how.block_m
    columns = 64 if how.apart else d * m // 128  # of the parts, of 64 rows, in which dQ is added up
    even = seq_q == padded and head_dim == d
    together = how.together
    if not together:
        together = heads_together(group * seq_q * d * (8 if how.fused else 4), RIGHT and not LEFT)
    tiles, pairs = -(-seq_kv // 128), batch * heads_kv
    programs = min(tiles * pairs, launch.multiprocessors(q.device))
    table, rounds = None, 0
    if d != 256:
        work = [
            steps(128 * j, m, seq_q, seq_kv, left if LEFT else None, right if RIGHT else None) for j in range(tiles)
        ]
        table, rounds = launch.planned([group * n + PER_TILE for n in work], pairs, programs, together, q.device)
    sizes = (group, seq_q, seq_kv, left if LEFT else 0, right if RIGHT else 0, together, factor, cap, spec.scale)
    features = {"LEFT": LEFT, "RIGHT": RIGHT, "SOFTCAP": spec.softcap != 0}

    per_program = 4096 // d
    statistics = Launch(
        backward.gluon_row_statistics, (rows * (padded // per_program),), (None,) * 5,
        (*o.stride()[:3], *do.stride()[:3], heads, seq_q, padded, head_dim,
         -1.0 / spec.scale if lse_first else LOG2E),
        {"EVEN": even, "ZERO": how.fused, "BM": m, "D": d, "ROWS": per_program},
    )  # fmt: skip
    # Of the kernels at head_dim 64 with grouped heads, ptxas 12.8 spills 48 bytes in this one: not with a tail, which
    # costs one comparison in masked tiles.
    tail = seq_kv % (64 if d == 256 else 128) != 0 or (d == 64 and group > 1 and RIGHT)
    constants = dict(features, D=d, TAIL=tail, GROUPED=group > 1, STAGES=how.stages)
    if d == 256:
        kv = Launch(
            backward.gluon_gradients_kv, (batch * heads_kv * -(-seq_kv // 64),),
            (*((64, d),) * 6, (2 * m,)),
            (batch * heads_kv, heads_kv, *sizes), dict(constants, P_STAGES=2),
        )  # fmt: skip
    else:
        kv = Launch(
            backward.gluon_gradients_fused, (programs,),
            ((m, d), (128, d), (128, d), (m, d), (64, d), (64, d), (2 * m,), (2 * columns if how.fused else 8, 32), None),
            (pairs, heads_kv, *sizes, rounds),
            dict(constants, BM=m, BN=128, **slots(how, d), DQ=how.fused, APART=how.apart, DQ_LATE=how.dq_late,
                 PLANNED=table is not None, EARLY=how.early, LSE_FIRST=lse_first, DV_LATE=how.dv_late,
                 RESIDENT=how.resident_kv),
        )  # fmt: skip
    if how.fused:
        gradients_q = Launch(
            backward.gluon_round_dq, (rows * padded * d // (64 * columns),), (None, None),
            (*dq.stride()[:3], heads, seq_q, padded // m, head_dim, spec.scale),
            {"EVEN": even, "BM": m, "D": d, "N": columns},
        )  # fmt: skip
    else:
        n = how.block_n
        gradients_q = Launch(
            backward.gluon_gradients_q, (rows * (padded // TILE),),
            ((64, d), (n, d), (n, d), (64, d), (64, d), None),
            (rows, heads, *sizes),
            dict(features, TAIL=seq_kv % n != 0, D=d, BM=m, BN=n, K_STAGES=how.k_stages, V_STAGES=how.v_stages,
                 LSE_FIRST=lse_first, RESIDENT=how.resident_q),
        )  # fmt: skip
    return Plan(how.fused, d, rows * padded * 2, table, statistics, kv, gradients_q)


def slots(how: Config, d: int) -> dict[str, int]:
    """How many tiles of K and of V the kernel that owns keys has room for: two, if the next one's may be loaded early."""
    parts = 2 if how.apart or how.dq_late else 1
    used = 2 * how.stages * how.block_m * (2 * d + 4) + parts * 2 * how.block_m * (128 if how.fused else 8) + 1024
    used += 2 * 128 * (2 * (64 if how.apart else d * how.block_m // 128) if how.fused else 8)
    k_slots = 2 if used + 3 * 256 * d <= SHARED else 1
    v_slots = 2 if used + 4 * 256 * d <= SHARED else 1
    return {"K_SLOTS": k_slots, "V_SLOTS": v_slots}


def steps(start_n: int, m: int, seq_q: int, seq_kv: int, left: int | None, right: int | None) -> int:
    """How many query tiles of m see a key of start_n..; backward.query_range() in Python."""
    offset, last = seq_kv - seq_q, min(start_n + 128, seq_kv) - 1
    hi = -(-seq_q // m)
    lo = 0 if right is None else min(max(start_n - offset - right, 0) // m, hi)
    return hi - lo if left is None else max(0, min(hi, -(-max(last + left - offset + 1, 0) // m)) - lo)


def heads_together(nbytes: int, uneven: bool) -> int:
    """How many heads' tiles take turns in the grid; nbytes: of Q, dO and dQ's accumulator of heads that share keys.

    Where tiles are uneven, the longest of a few heads start before the short ones of any. What is read and added to
    again and again should stay in the L2 cache.
    """
    return max(1, min(TOGETHER, L2_SHARE // nbytes)) if uneven else 1


class Launch(launch.Launch):
    """A launch whose tensors may be float32 scratch, moved linearly: tiles of (n,), or (n, 32) for the accumulator."""

    __slots__ = ()

    def arguments(self, tensors: tuple) -> tuple[tuple, dict]:
        """The (positional, keyword) arguments of Triton's own dispatch."""
        self.shells = tuple(tile and described_by(x, tile) for x, tile in zip(tensors, self.tiles, strict=True))
        return (*self.described(tensors), *self.scalars), {**self.constants, "num_warps": 4}


def described_by(x: torch.Tensor, tile: tuple[int, ...]) -> TensorDescriptor:
    """The descriptor that moves `tile` of x at once."""
    if x.dim() == 4:
        return launch.descriptor(x, *tile)
    swizzle = 0 if x.dim() == 1 else 128
    shared = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=32, rank=x.dim())
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(tile), shared)


def chosen(problem: Problem, deterministic: bool) -> Config:
    """The configuration of a backward."""
    right = spec_of(problem.replace(alibi=False)).band[1]
    causal = right is not None and right < problem.seq_q - 1
    return choose(block_d(problem.head_dim), problem.softcap != 0, deterministic, causal)


def described(problem: Problem, deterministic: bool = False) -> list[str]:
    """How the gradients of `problem` are computed, for `explain`."""
    return [f"bwd: {chosen(problem, deterministic)}"]


def scratch_bytes(problem: Problem, deterministic: bool = False) -> int:
    """Device memory a backward takes beyond inputs and outputs: row statistics and, if fused, dQ's accumulator."""
    rows, d = problem.batch * problem.heads_q * -(-problem.seq_q // TILE) * TILE, block_d(problem.head_dim)
    return 4 * rows * (2 + (d if chosen(problem, deterministic).fused else 0))


def planned(problem: Problem, deterministic: bool, config: Config | None = None) -> dict[str, tuple[Launch, tuple]]:
    """kernel -> (its launch, its tensors), for tensors that hold nothing: to build them without a GPU."""
    dtype = TORCH_DTYPES[problem.dtype]
    with torch.device("meta"):
        q = readable(torch.empty(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype))
        k = readable(torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype))
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        plan = plan_backward(q, q, k, k, q, q, k, k, spec_of(problem), deterministic, config)
        stats = torch.empty(plan.stats_size, dtype=torch.float32)
        acc = torch.empty((plan.stats_size * plan.width // 64, 32), dtype=torch.float32)
    launches = plan.steps(q, q, k, k, q, lse, q, k, k, stats, acc)
    return dict(zip(("statistics", "kv", "q"), launches, strict=True))
