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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the gradients are computed. Fused: five products, dQ added up by atomics; else two kernels and seven products.

    block_m, stages: queries a tile, and tiles in flight, of the kernel that owns keys. pipelined: the next tile's
    scores begin behind this tile's dQ. ahead: they begin before this tile's softmax (apart; three stages). early: dP is issued wholly before the softmax. lse_first, delta_first: the
    accumulators of S and dP begin with -lse and -delta. apart: dQ is computed by a third group (fused). dv_late: dV's product begins behind dS. dk_late: dK's product runs behind dQ's, beside the
    staging of dQ (fused and pipelined; ptxas 12.8 crashes over it, 13.0 does not).
    block_n, k_stages, v_stages: keys a tile, and tiles in flight, of the kernel that owns queries. resident_q:
    Q and dO are register operands there; resident_kv: K and V, in the kernel that owns keys. together: how many
    heads' tiles take turns in the grid. parts: the batch is taken in so many parts, one after the other, so that
    dQ's accumulator is smaller, and stays in the L2 cache.
    """

    fused: bool
    block_m: int
    stages: int = 2
    pipelined: bool = True
    ahead: bool = False
    early: bool = False
    lse_first: bool = False
    delta_first: bool = True
    apart: bool = False
    dv_late: bool = False
    dk_late: bool = False
    block_n: int = 64
    k_stages: int = 2
    v_stages: int = 2
    resident_q: bool = False
    resident_kv: bool = False
    together: int = 1
    parts: int = 1

    def __str__(self) -> str:
        resident = f"{' Q and dO resident' * self.resident_q}{' K and V resident' * self.resident_kv}"
        if self.fused:
            how = f"{self.block_m}x128 s{self.stages}{' pipelined' * self.pipelined}{' ahead' * self.ahead}{' early' * self.early}{' lse first' * self.lse_first}{' delta first' * self.delta_first}{' dk late' * self.dk_late}{' dv late' * self.dv_late}{' dQ apart' * self.apart}"
            return f"fused, {how}{resident}, dQ by float32 atomics: not deterministic"
        how = f"{' lse first' * self.lse_first}{resident}"
        return f"two kernels, tiles of {self.block_m} queries and {self.block_n} keys{how}: deterministic"


def choose(block_d: int, softcap: bool, deterministic: bool) -> Config:
    """The configuration for a head_dim padded to block_d. A softcap's slope takes registers: its tiles are smaller."""
    if block_d == 256:  # dK, dV and dQ of one tile do not fit together: the deterministic way is the fast one
        return Config(fused=False, block_m=64, block_n=32 if softcap else 64, v_stages=1)
    if block_d == 128:
        if deterministic:
            return Config(fused=False, block_m=64, stages=3, early=True)
        return Config(fused=True, block_m=64)
    block_m = 64 if softcap else 128
    if deterministic:
        return Config(fused=False, block_m=block_m, early=True, block_n=block_m)
    return Config(fused=True, block_m=block_m)


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
    each = [(do, q, k, v, o, lse, dq, dk, dv)]
    if config is not None and config.parts > 1:
        each = parted(each[0], config.parts)
    plan = launch._plans.get(call_key)
    if plan is None:
        do, q, k, v, o, lse, *outputs = each[0]
        plan = remember(call_key, plan_backward(do, q, k, v, o, *outputs, spec, deterministic, config))
    stats = torch.empty(plan.stats_size, dtype=torch.float32, device=q.device)
    acc = stats.view(-1, 32)
    if plan.fused:
        acc = torch.empty((plan.stats_size * plan.width // 64, 32), dtype=torch.float32, device=q.device)
    for part in each:
        for step, arguments in plan.steps(*part, stats, acc):
            step(*arguments)
    return dq, dk, dv


def parted(tensors: tuple, parts: int) -> list[tuple]:
    """The tensors of each part of the batch; all of it where the parts are not alike. They share a plan: the addresses
    of o and lse, which are no descriptors, must be as aligned as the first part's."""
    _, q, _, _, o, lse, *_ = tensors
    batch = q.shape[0] // parts
    if q.shape[0] % parts or any(x.stride(0) * batch % 8 for x in (o, lse)):
        return [tensors]
    return list(zip(*(x.split(batch) for x in tensors), strict=True))


class Plan(NamedTuple):
    """The launches of one backward, in their order."""

    fused: bool
    width: int  # the head_dim that the kernels compute with
    stats_size: int  # float32: two numbers a query, padded
    statistics: Launch
    kv: Launch
    q: Launch

    def steps(self, do, q, k, v, o, lse, dq, dk, dv, stats, acc) -> tuple:
        """(launch, its tensors) in their order; acc is dQ's accumulator, or anything if not fused."""
        owned_keys = (q, k, v, do, dk, dv, stats)
        return (
            (self.statistics, (o, do, lse, stats, acc)),
            (self.kv, owned_keys if self.width == 256 else (*owned_keys, acc)),
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
    how = config or choose(d, spec.softcap != 0, deterministic)
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
    sizes = (group, seq_q, seq_kv, left if LEFT else 0, right if RIGHT else 0, how.together, factor, cap, spec.scale)
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
            backward.gluon_gradients_fused, (batch * heads_kv * -(-seq_kv // 128),),
            ((m, d), (128, d), (128, d), (m, d), (64, d), (64, d), (2 * m,), (2 * columns if how.fused else 8, 32)),
            (batch * heads_kv, heads_kv, *sizes),
            dict(constants, BM=m, BN=128, DQ=how.fused, APART=how.apart, PIPELINED=how.pipelined, AHEAD=how.ahead, EARLY=how.early, LSE_FIRST=lse_first,
                 DELTA_FIRST=how.delta_first, DV_LATE=how.dv_late, DK_LATE=how.dk_late, RESIDENT=how.resident_kv),
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
    return Plan(how.fused, d, rows * padded * 2, statistics, kv, gradients_q)


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


def described(problem: Problem, deterministic: bool = False) -> list[str]:
    """How the gradients of `problem` are computed, for `explain`."""
    return [f"bwd: {choose(block_d(problem.head_dim), problem.softcap != 0, deterministic)}"]


def scratch_bytes(problem: Problem, deterministic: bool = False) -> int:
    """Device memory a backward takes beyond inputs and outputs: row statistics and, if fused, dQ's accumulator."""
    rows, d = problem.batch * problem.heads_q * -(-problem.seq_q // TILE) * TILE, block_d(problem.head_dim)
    return 4 * rows * (2 + (d if choose(d, problem.softcap != 0, deterministic).fused else 0))


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
    steps = plan.steps(q, q, k, k, q, lse, q, k, k, stats, acc)
    return dict(zip(("statistics", "kv", "q"), steps, strict=True))
