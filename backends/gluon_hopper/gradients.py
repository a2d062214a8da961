"""From validated tensors to the launched backward kernels. A call's layout is planned once; a repeated call launches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch

from flash2.backends.gluon_hopper import backward
from flash2.backends.gluon_hopper.compat import TensorDescriptor, gl
from flash2.core.contract import TORCH_DTYPES, Spec, spec_of
from flash2.core.problem import Problem

LOG2E = math.log2(math.e)
TILE = 128  # queries: statistics and the accumulator of dQ are padded to whole ones
ROWS_16 = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
ROWS_32 = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
LINE_32 = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the gradients are computed. Fused: five products, dQ added up by atomics; else two kernels and seven products.

    block_m, stages: queries a tile, and tiles in flight, of the kernel that owns keys. pipelined: the next tile's
    scores begin behind this tile's dQ. early: dP is issued wholly before the softmax. delta_first: dP's accumulator
    begins with -delta.
    block_n, k_stages, v_stages: keys a tile, and tiles in flight, of the kernel that owns queries. together: how many
    heads' tiles take turns in the grid.
    """

    fused: bool
    block_m: int
    stages: int = 2
    pipelined: bool = True
    early: bool = False
    delta_first: bool = True
    block_n: int = 64
    k_stages: int = 2
    v_stages: int = 2
    together: int = 1

    def __str__(self) -> str:
        if self.fused:
            how = f"{self.block_m}x128 s{self.stages}{' pipelined' * self.pipelined}{' early' * self.early}{' delta first' * self.delta_first}"
            return f"fused, {how}, dQ by float32 atomics: not deterministic"
        return f"two kernels, tiles of {self.block_m} queries and {self.block_n} keys: deterministic"


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
    do, q, k, v = describable(do), describable(q), describable(k), describable(v)
    o, lse = rows_dense(o), lse.contiguous()
    dq, dk, dv = describable_like(q), describable_like(k), describable_like(v)
    call_key = (
        layout(do), layout(q), layout(k), layout(v), o.stride(), (o.data_ptr() | lse.data_ptr()) % 16, dq.stride(), dk.stride(),
        dv.stride(), q.dtype, q.get_device(), spec.scale, spec.causal, spec.window, spec.softcap, deterministic, config,
    )  # fmt: skip
    plan = _plans.get(call_key)
    if plan is None:
        if len(_plans) >= _PLANS_LIMIT:
            _plans.clear()
        plan = _plans[call_key] = plan_backward(do, q, k, v, o, dq, dk, dv, spec, deterministic, config)
    stats = torch.empty(plan.stats_size, dtype=torch.float32, device=q.device)
    acc = stats.view(-1, 32)
    if plan.acc_rows:
        acc = torch.empty((plan.acc_rows, 32), dtype=torch.float32, device=q.device)
    plan.statistics(o, do, lse, stats, acc)
    plan.kv(q, k, v, do, dk, dv, stats, acc)
    plan.q(q, k, v, do, dq, stats, acc)
    return dq, dk, dv


_plans: dict[tuple, Plan] = {}
_PLANS_LIMIT = 1 << 12  # lengths may never repeat


class Plan(NamedTuple):
    """The launches of one backward in their order, and the float32 scratch that they share."""

    stats_size: int
    acc_rows: int  # of 32 numbers, 0: none
    statistics: Launch
    kv: Launch
    q: Launch


def plan_backward(do, q, k, v, o, dq, dk, dv, spec: Spec, deterministic: bool, config: Config | None = None) -> Plan:
    """The launches for tensors laid out like these."""
    batch, heads, seq_q, head_dim = q.shape
    heads_kv, seq_kv = k.shape[1:3]
    group, d = heads // heads_kv, padded_head_dim(head_dim)
    left, right = spec.band
    LEFT = left is not None and left < seq_kv - 1  # else it hides nothing
    RIGHT = right is not None and right < seq_q - 1
    how = config or choose(d, spec.softcap != 0, deterministic)
    factor, cap = spec.scale * LOG2E, 0.0
    if spec.softcap:
        factor, cap = 2 * spec.scale * LOG2E / spec.softcap, spec.softcap * LOG2E
    padded = -(-seq_q // TILE) * TILE
    rows = batch * heads
    m = how.block_m
    even = seq_q == padded and head_dim == d
    sizes = (group, seq_q, seq_kv, left if LEFT else 0, right if RIGHT else 0, how.together, factor, cap, spec.scale)
    features = {"LEFT": LEFT, "RIGHT": RIGHT, "SOFTCAP": spec.softcap != 0}

    def tile(n: int) -> tuple:
        return (1, 1, n, d), ROWS_16

    per_program = 4096 // d
    statistics = Launch(
        backward.gluon_row_statistics, rows * (padded // per_program), (None,) * 5,
        (*o.stride()[:3], *do.stride()[:3], heads, seq_q, padded, head_dim),
        {"EVEN": even, "ZERO": how.fused, "BM": m, "D": d, "ROWS": per_program},
    )  # fmt: skip
    line = ((2 * m,), LINE_32)
    tail = dict(features, D=d, TAIL=seq_kv % (64 if d == 256 else 128) != 0, GROUPED=group > 1, STAGES=how.stages)
    if d == 256:
        kv = Launch(
            backward.gluon_gradients_kv, batch * heads_kv * -(-seq_kv // 64),
            (tile(64), tile(64), tile(64), tile(64), tile(64), tile(64), line, SKIP),
            (batch * heads_kv, heads_kv, *sizes), dict(tail, P_STAGES=2),
        )  # fmt: skip
    else:
        staged = (m * d // 64 if how.fused else 8, 32), ROWS_32
        kv = Launch(
            backward.gluon_gradients_fused, batch * heads_kv * -(-seq_kv // 128),
            (tile(m), tile(128), tile(128), tile(m), tile(64), tile(64), line, staged),
            (batch * heads_kv, heads_kv, *sizes),
            dict(tail, BM=m, BN=128, DQ=how.fused, PIPELINED=how.pipelined, EARLY=how.early, DELTA_FIRST=how.delta_first),
        )  # fmt: skip
    if how.fused:
        gradients_q = Launch(
            backward.gluon_round_dq, rows * (padded // 64) * (2 if m == 64 else 1),
            (SKIP, SKIP, SKIP, SKIP, None, SKIP, None),
            (*dq.stride()[:3], heads, seq_q, padded // m, head_dim, spec.scale),
            {"EVEN": even, "BM": m, "D": d},
        )  # fmt: skip
    else:
        gradients_q = Launch(
            backward.gluon_gradients_q, rows * (padded // TILE),
            (tile(64), tile(how.block_n), tile(how.block_n), tile(64), tile(64), None, SKIP),
            (rows, heads, *sizes),
            dict(features, TAIL=seq_kv % how.block_n != 0, D=d, BM=m, BN=how.block_n, K_STAGES=how.k_stages, V_STAGES=how.v_stages),
        )  # fmt: skip
    return Plan(rows * padded * 2, rows * padded * d // 32 if how.fused else 0, statistics, kv, gradients_q)


def described(problem: Problem, deterministic: bool = False) -> list[str]:
    """How the gradients of `problem` are computed, for `explain`."""
    return [f"bwd: {choose(padded_head_dim(problem.head_dim), problem.softcap != 0, deterministic)}"]


def scratch_bytes(problem: Problem, deterministic: bool = False) -> int:
    """Device memory a backward takes beyond inputs and outputs: row statistics and, if fused, dQ's accumulator."""
    rows, d = problem.batch * problem.heads_q * -(-problem.seq_q // TILE) * TILE, padded_head_dim(problem.head_dim)
    return 4 * rows * (2 + (d if choose(d, problem.softcap != 0, deterministic).fused else 0))


def planned(problem: Problem, deterministic: bool, config: Config | None = None) -> dict[str, tuple[Launch, tuple]]:
    """kernel -> (its launch, tensors as it gets them), contiguous tensors that hold nothing: for builds without a GPU."""
    dtype = TORCH_DTYPES[problem.dtype]
    with torch.device("meta"):
        q = torch.empty(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype)
        k = torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype)
        q, k = describable(q), describable(k)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        plan = plan_backward(q, q, k, k, q, q, k, k, spec_of(problem), deterministic, config)
        stats = torch.empty(plan.stats_size, dtype=torch.float32)
        acc = torch.empty((plan.acc_rows, 32), dtype=torch.float32) if plan.acc_rows else stats.view(-1, 32)
    return {
        "statistics": (plan.statistics, (q, q, lse, stats, acc)),
        "kv": (plan.kv, (q, k, k, q, k, k, stats, acc)),
        "q": (plan.q, (q, k, k, q, q, stats, acc)),
    }


# ---- tensors that TMA can describe


def padded_head_dim(head_dim: int) -> int:
    """The head_dim that the kernels compute with: 64, 128 or 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def layout(x: torch.Tensor) -> tuple:
    """What a launch depends on: the shape and the strides."""
    return x.shape, x.stride()


def rows_dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where a row's elements are not neighbours."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def describable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it whose address and strides are multiples of 16 bytes, and none of them 0."""
    size = x.element_size()
    fits = x.data_ptr() % 16 == 0 and (x.stride(3) == 1 or x.shape[3] == 1) and all(
        0 < s * size < 1 << 40 and s * size % 16 == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1
    )  # fmt: skip
    return x if fits else describable_like(x).copy_(x)


def describable_like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor like x, with rows of a multiple of 16 bytes."""
    if x.shape[3] % 8 == 0:
        out = torch.empty_like(x)
        if all(s % 8 == 0 for s in out.stride()[:3]):
            return out
    return torch.empty((*x.shape[:3], -(-x.shape[3] // 8) * 8), dtype=x.dtype, device=x.device)[..., : x.shape[3]]


def descriptor(x: torch.Tensor, block: tuple[int, ...], shared: Any) -> TensorDescriptor:
    """x in blocks of that shape. The stride of an axis of length 1 is never taken, but must fit all the same."""
    strides = [s if n > 1 else 16 for s, n in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(block), shared)


# ---- launches

SKIP = ()  # this kernel does not take that tensor


class Launch:
    """One kernel with all but its tensors bound. The first call compiles, later ones skip Triton's dispatch."""

    __slots__ = ("blocks", "constants", "grid", "kernel", "runner", "scalars", "shells", "taken")

    def __init__(self, kernel, programs: int, blocks: tuple, scalars: tuple, constants: dict) -> None:
        self.kernel, self.grid, self.scalars, self.constants = kernel, (programs,), scalars, constants
        self.taken = [n for n, block in enumerate(blocks) if block is not SKIP]
        # What a tensor's descriptor loads at once; None: the kernel takes a pointer.
        self.blocks = [blocks[n] for n in self.taken]
        self.runner = None
        self.shells: list[TensorDescriptor | None] = []

    def arguments(self, tensors: tuple) -> tuple[tuple, dict]:
        """The (positional, keyword) arguments of Triton's own dispatch."""
        taken = [tensors[n] for n in self.taken]
        self.shells = [block and descriptor(x, *block) for x, block in zip(taken, self.blocks, strict=True)]
        return (*self.described(tensors), *self.scalars), {**self.constants, "num_warps": 4}

    def described(self, tensors: tuple) -> list:
        """The tensors this kernel takes, through the first call's descriptors moved to these addresses."""
        return [
            tensors[n] if shell is None else moved(shell, tensors[n])
            for n, shell in zip(self.taken, self.shells, strict=True)
        ]

    def __call__(self, *tensors: torch.Tensor) -> None:
        if self.runner is not None:
            self.runner(*self.described(tensors), *self.scalars)
            return
        positional, keyword = self.arguments(tensors)
        compiled = self.kernel[self.grid](*positional, **keyword)
        # The plan's key covers all that Triton specialises on, so this binary is right for every call of it.
        # Constants are bound by name above and by place here: they end the signature, in its order.
        self.scalars += tuple(self.constants[param.name] for param in self.kernel.params if param.is_constexpr)
        self.runner = compiled[(*self.grid, 1, 1)]


def moved(shell: TensorDescriptor, x: torch.Tensor) -> TensorDescriptor:
    """`shell` for x, which has its layout. Making one anew checks that again, and costs as much as the launch."""
    desc = object.__new__(TensorDescriptor)
    desc.__dict__.update(shell.__dict__, base=x)
    return desc
