"""From validated tensors to launched kernels. A call's shape is planned once; a repeated call only launches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flash2.backends.triton_fa2 import backward, configs, forward, prepare
from flash2.backends.triton_fa2.configs import Key, TileConfig
from flash2.backends.triton_fa2.tiles import INTERPRET
from flash2.core import quick
from flash2.core.contract import DTYPE_NAMES, TORCH_DTYPES, Spec, spec_of
from flash2.core.problem import Problem

T = TypeVar("T")
LOG2E = math.log2(math.e)
SMALLEST_NORMAL = 2.0**-126
PREPARED_ROWS = 64  # a program of the preparing kernels
Pins = dict[str, TileConfig]  # kernel name -> the configuration it must run with


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, pins: Pins | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): o laid out like q, lse (batch, heads_q, seq_q) float32, natural log."""
    call_key = ("fwd", layout(q), layout(k), layout(v), *options(spec, pins), q.dtype, q.get_device())
    o, lse = empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    plan = _plans.get(call_key)
    if plan is None:
        read = aligned(q), aligned(k), aligned(v)
        launches = plan_forward(*read, o, spec, pins or {})
        plan = remember(call_key, Plan(launches, any(x is not y for x, y in zip(read, (q, k, v), strict=True))))
    if plan.copies:
        q, k, v = aligned(q), aligned(k), aligned(v)
    plan.launches(q, k, v, o, lse, spec.alibi_slopes)
    return o, lse


def differentiate(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    spec: Spec, pins: Pins | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), laid out like q, k, v."""
    lse, tensors = lse.contiguous(), (do, q, k, v, o)
    call_key = ("bwd", *map(layout, tensors), *options(spec, pins), q.dtype, q.get_device())
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    plan = _plans.get(call_key)
    if plan is None:
        read = tuple(map(aligned, tensors))
        launches = plan_backward(*read, dq, dk, dv, spec, pins or {})
        plan = remember(call_key, Plan(launches, any(x is not y for x, y in zip(read, tensors, strict=True))))
    if plan.copies:
        do, q, k, v, o = map(aligned, tensors)
    launches = plan.launches
    lse2, delta = torch.empty((2, q.shape[0] * q.shape[1], launches.rows_padded), dtype=torch.float32, device=q.device)
    launches.statistics(o, do, lse, lse2, delta)
    for gradients_kv in launches.kv.values():
        gradients_kv(q, k, v, do, lse2, delta, dk, dv, spec.alibi_slopes)
    launches.q(q, k, v, do, lse2, delta, dq, spec.alibi_slopes)
    return dq, dk, dv


class Plan(NamedTuple):
    """What a call of one kind launches, and whether some of its tensors are read from an aligned() copy."""

    launches: Any
    copies: bool


_plans: dict[tuple, Any] = {}
_PLANS_LIMIT = 1 << 12  # a decoder's seq_kv grows for ever


def remember(call_key: tuple, plan: T) -> T:
    """Keep `plan` for the next call of its kind."""
    if len(_plans) >= _PLANS_LIMIT:
        _plans.clear()
    _plans[call_key] = plan
    return plan


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Memory laid out like x, or densely where a row's elements are no neighbours in x."""
    return torch.empty_like(x) if rows_dense(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rows_dense(x: torch.Tensor) -> bool:
    """Are a row's elements neighbours?"""
    return x.stride(3) == 1 or x.shape[3] == 1


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x where its rows can be read 16 bytes at once, else a copy of it with rows padded for that: element by
    element, its addresses take the registers that a kernel's tiles want."""
    size = x.element_size()
    steps = [s * size for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    if rows_dense(x) and x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps):
        return x
    unit = 16 // size
    padded = -(-x.shape[3] // unit) * unit
    copy = torch.empty((*x.shape[:3], padded), dtype=x.dtype, device=x.device)[..., : x.shape[3]]
    return copy.copy_(x)


def layout(x: torch.Tensor) -> tuple:
    """What a compiled kernel depends on: the shape, the strides, and whether the address is a multiple of 16."""
    return x.shape, x.stride(), x.data_ptr() % 16 == 0


def options(spec: Spec, pins: Pins | None) -> tuple:
    """The parts of a call that are no tensors, for the plans' keys."""
    slopes = None if spec.alibi_slopes is None else (spec.alibi_slopes.stride(), spec.alibi_slopes.data_ptr() % 16 == 0)
    return (
        spec.scale, spec.precision, spec.causal, spec.window, spec.softcap, slopes,
        None if not pins else tuple(sorted(pins.items(), key=lambda item: item[0])),
    )  # fmt: skip


def plan_forward(q, k, v, o, spec: Spec, pins: Pins) -> Launch | Prepared:
    """The forward launch for tensors laid out like these."""
    maths = Maths(q, k, spec)
    config = maths.config("fwd", pins, (q, k, v))
    parts, resident, turned = maths.parts(config), maths.resident(config), maths.turned(config)
    m, n, d = config.block_m, config.block_n, maths.block_d
    seq_kv = k.shape[2]
    scale, negate = maths.scale, maths.scale < 0 and maths.fold
    launch = Launch(
        forward.attention_forward,
        (triton.cdiv(q.shape[2], m) * q.shape[0] * q.shape[1],),
        config,
        (tile(m, d, parts if resident else 1), tile(n, d, parts), (1, 1, d, n) if turned else tile(n, d, parts), None, None, None),
        (*strides(q, k, v, o), *maths.slope_strides, *maths.sizes, maths.left, maths.right,
         abs(scale) if negate else scale, maths.cap),
        dict(maths.features, FOLD=maths.fold, NEGATE=negate, UNEVEN=seq_kv % n != 0, TAIL=maths.tail(config),
             PAD_D=maths.pad_d, WIDE=too_wide(q, k, v, o), PRECISION=maths.precision, TMA=config.tma, PARTS=parts,
             RESIDENT=resident, TURNED=turned, CHUNKED=maths.chunked(config), WS=config.ws, ONE_LOOP=config.one_loop, LATE=config.late,
             STAGES=config.num_stages,
             BLOCK_M=m, BLOCK_N=n, BLOCK_D=d),
    )  # fmt: skip
    if turned:
        return Prepared(launch, {2: TurnHeads(maths)})
    return (
        Prepared(launch, {n: SplitHeads(maths, parts) for n in ((0, 1, 2) if resident else (1, 2))})
        if parts > 1
        else launch
    )


class BackwardPlan(NamedTuple):
    """The launches of one backward in their order; kv is one for dk and dv, or one for each."""

    rows_padded: int  # rows of the statistics, a head
    statistics: Launch
    kv: dict[str, Launch | Prepared]
    q: Launch | Prepared


def plan_backward(do, q, k, v, o, dq, dk, dv, spec: Spec, pins: Pins) -> BackwardPlan:
    """The backward launches for tensors laid out like these."""
    maths = Maths(q, k, spec)
    operands = (q, k, v, do)
    both, qs = maths.config("dkdv", pins, operands), maths.config("dq", pins, operands)
    kvs = {name: maths.config(name, pins, operands) for name in ("dk", "dv")} if both.split else {"dkdv": both}
    heads, group, seq_q, seq_kv, head_dim = maths.sizes
    step = max(config.block_m for config in (*kvs.values(), qs))
    rows_padded = triton.cdiv(seq_q, step) * step
    d = maths.block_d
    block = 32 if d > 64 else 64
    wide = too_wide(do, q, k, v, o, dq, dk, dv)
    statistics = Launch(
        backward.row_statistics,
        (triton.cdiv(rows_padded, block) * q.shape[0] * heads,),
        TileConfig(block_m=block, block_n=0, num_warps=4, num_stages=1),
        (None,) * 5,
        (*strides(o, do), heads, seq_q, rows_padded, head_dim),
        {"PAD_D": maths.pad_d, "WIDE": wide, "BLOCK_M": block, "BLOCK_D": d},
    )

    def constants(config: TileConfig) -> dict:
        return dict(
            maths.features, PAD_D=maths.pad_d, WIDE=wide, PRECISION=maths.precision, TMA=config.tma,
            PARTS=maths.parts(config), RESIDENT=maths.resident(config), TURNED=maths.turned(config), CHUNKED=maths.chunked(config),
            ONE_LOOP=config.one_loop, STAGES=config.num_stages, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=d,
        )  # fmt: skip

    def gradients_kv(name: str, config: TileConfig) -> Launch | Prepared:
        parts, rows, turned = maths.parts(config), (1, config.block_m), maths.turned(config)
        # Tensors that are split beforehand, by place: dv reads no v.
        split = ((0, 1, 2, 3) if "dk" in name else (0, 1, 3)) if maths.resident(config) else (0, 3)
        k_tile, v_tile = (tile(config.block_n, d, parts if n in split else 1) for n in (1, 2))
        theirs = tile(config.block_m, d, parts)
        # dk sums q over its rows, dv do.
        sums = {0: "dk" in name, 3: "dv" in name}
        more = tuple((1, 1, d, config.block_m) if read else None for read in sums.values()) if turned else ()
        unturned = () if turned else (None, None)
        launch = Launch(
            backward.gradients_kv,
            (triton.cdiv(seq_kv, config.block_n) * k.shape[0] * k.shape[1],),
            config,
            (theirs, k_tile, v_tile, theirs, rows, rows, None, None, None, *more),
            (*unturned, *strides(q, k, v, do, dk, dv), *maths.slope_strides, k.shape[1], group, seq_q, seq_kv,
             rows_padded, head_dim, maths.left, maths.right, maths.scale, maths.cap, spec.scale),
            dict(constants(config), UNEVEN=seq_q % config.block_m != 0, DK="dk" in name, DV="dv" in name),
        )  # fmt: skip
        if turned:
            return Prepared(launch, {}, {n: TurnHeads(maths) if read else None for n, read in sums.items()})
        return Prepared(launch, {n: SplitHeads(maths, parts) for n in split}) if parts > 1 else launch

    parts, rows, turned = maths.parts(qs), (1, qs.block_m), maths.turned(qs)
    resident = maths.resident(qs)
    ours, theirs = tile(qs.block_m, d, parts if resident else 1), tile(qs.block_n, d, parts)
    more, unturned = (((1, 1, d, qs.block_n),), ()) if turned else ((), (None,))
    gradients_q = Launch(
        backward.gradients_q,
        (triton.cdiv(seq_q, qs.block_m) * q.shape[0] * heads,),
        qs,
        (ours, theirs, theirs, ours, rows, rows, None, None, *more),
        (*unturned, *strides(q, k, v, do, dq), *maths.slope_strides, heads, group, seq_q, seq_kv, rows_padded,
         head_dim, maths.left, maths.right, maths.scale, maths.cap, spec.scale),
        dict(constants(qs), UNEVEN=seq_kv % qs.block_n != 0, TAIL=maths.tail(qs)),
    )  # fmt: skip
    if parts > 1:
        gradients_q = Prepared(
            gradients_q, {n: SplitHeads(maths, parts) for n in ((0, 1, 2, 3) if resident else (1, 2))}
        )
    elif turned:
        gradients_q = Prepared(gradients_q, {}, {1: TurnHeads(maths)})
    return BackwardPlan(rows_padded, statistics, {n: gradients_kv(n, c) for n, c in kvs.items()}, gradients_q)


def configurations(problem: Problem, device: torch.device, pins: Pins) -> dict[str, tuple[TileConfig, str]]:
    """kernel -> (configuration, where it comes from) for dense tensors of `problem`: what a call would launch."""
    dtype = TORCH_DTYPES[problem.dtype]
    with torch.device("meta"):
        q = torch.empty(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype)
        k = torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype)
    maths = Maths(q, k, spec_of(problem.replace(alibi=False)), device)
    found = {}
    for kernel in ("fwd",) if problem.pass_ == "fwd" else ("fwd", "dkdv", "dq"):
        found[kernel] = (pins[kernel], "pin") if kernel in pins else maths.chosen(kernel, tune=False)
        if found[kernel][0].split:
            del found[kernel]
            found |= {
                name: (pins[name], "pin") if name in pins else maths.chosen(name, tune=False) for name in ("dk", "dv")
            }
    return found


class Maths:
    """What a Spec means to the kernels: folded factors, switches, and the keys of the configurations."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, spec: Spec, device: torch.device | None = None) -> None:
        batch, heads, seq_q, head_dim = q.shape
        seq_kv = k.shape[2]
        left, right = spec.band
        # A band wider than the problem is no band: the last query sees key 0, the first the last key.
        left = None if left is None or left >= seq_kv - 1 else left
        right = None if right is None or right >= seq_q - 1 else right
        self.left, self.right = left or 0, right or 0
        self.features = {
            "LEFT": left is not None,
            "RIGHT": right is not None,
            "SOFTCAP": spec.softcap != 0,
            "ALIBI": spec.alibi_slopes is not None,
        }
        self.sizes = (heads, heads // k.shape[1], seq_q, seq_kv, head_dim)
        self.scale = spec.scale / spec.softcap if spec.softcap else spec.scale * LOG2E
        self.cap = spec.softcap * LOG2E
        # Multiplying after the maximum needs a factor whose sign is known and that float32 does not flush to 0.
        self.fold = not (spec.softcap or self.features["ALIBI"]) and abs(self.scale) >= SMALLEST_NORMAL
        slopes = spec.alibi_slopes
        self.slope_strides = (0, 0) if slopes is None else (0, *slopes.stride())[-2:]
        self.block_d = max(16, triton.next_power_of_2(head_dim))
        self.pad_d = head_dim != self.block_d
        self.spec_precision = spec.precision
        self.precision = spec.precision if q.dtype == torch.float32 else "tf32"  # 16-bit products are exact anyway
        self.device = device or q.device
        self.arch = arch_of(self.device)
        self.problem = Problem(
            batch=batch, heads_q=heads, heads_kv=k.shape[1], seq_q=seq_q, seq_kv=seq_kv, head_dim=head_dim,
            dtype=DTYPE_NAMES[q.dtype], precision=spec.precision, causal=spec.causal, window=spec.window,
            softcap=spec.softcap, alibi=self.features["ALIBI"], scale=spec.scale, pass_="fwd+bwd",
        )  # fmt: skip

    def tail(self, config: TileConfig) -> bool:
        """Must keys past seq_kv be masked? A causal mask hides them from every row there is."""
        causal = self.features["RIGHT"] and self.right == 0
        return self.sizes[3] % config.block_n != 0 and not causal

    def config(self, kernel: str, pins: Pins, operands: tuple[torch.Tensor, ...]) -> TileConfig:
        """The configuration of `kernel`: one without tensor descriptors where the operands' strides forbid them."""
        config = pins.get(kernel) or self.chosen(kernel)[0]
        if not config.tma or all(map(fits_descriptor, operands)):
            return config
        if kernel in pins:
            return config.replace(tma=False, ws=False, prepared=False, resident=False, mixed=False)
        return configs.fallback(self.key(kernel))  # with pointers the table's tiles have too few registers

    def chosen(self, kernel: str, *, tune: bool = True) -> tuple[TileConfig, str]:
        """(configuration, where it comes from) for `kernel`. On a device that no table knows, the first call of a
        kind tunes; without `tune`, under FLASH2_TRITON_TUNE=0 and into a CUDA graph it takes the fallback."""
        key, name = self.key(kernel), torch.cuda.get_device_name(self.device) if self.arch != "cpu" else ""
        if (found := configs.choose(key, name)) is not None:
            return found
        if not tune or os.environ.get("FLASH2_TRITON_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
            return configs.fallback(key), "fallback: this device is not tuned yet"
        from flash2.backends.triton_fa2.tune import autotune

        return autotune(key, self.problem, self.device), "tuned just now"

    def parts(self, config: TileConfig) -> int:
        """How many bfloat16 parts the tensors that `config`'s programs share are split into beforehand."""
        return {"bf16x3": 2, "bf16x6": 3}.get(self.precision, 1) if config.prepared else 1

    def resident(self, config: TileConfig) -> int:
        """How many parts of what one of `config`'s programs keeps for its whole loop lie in shared memory; 0: it splits
        that itself."""
        parts = self.parts(config)
        return 0 if parts == 1 else parts if config.resident else parts - 1 if config.mixed else 0

    def turned(self, config: TileConfig) -> bool:
        """Are operands that a TF32 product sums over rows of transposed beforehand? Not with `late`: without a
        conversion the weights are the operand, and ptxas writes the next ones over them while a product reads them."""
        return config.prepared and self.spec_precision == "tf32" and not config.late

    def chunked(self, config: TileConfig) -> bool:
        """Are products over head_dim taken in pieces? IEEE float32 is, where no tensor core multiplies."""
        return self.spec_precision == "ieee" and not config.tma

    def key(self, kernel: str) -> Key:
        """What the table of configurations is asked for."""
        dressed = self.features["LEFT"] or self.features["SOFTCAP"] or self.features["ALIBI"]
        dressed |= self.pad_d and self.spec_precision == "ieee"
        return Key(
            kernel=kernel, arch=self.arch, precision=self.spec_precision, block_d=self.block_d,
            work="dressed" if dressed else "masked" if self.features["RIGHT"] else "full",
            seq="short" if max(self.sizes[2:4]) <= configs.SHORT else "long",
        )  # fmt: skip


def arch_of(device: torch.device) -> str:
    """The name configurations are kept under: sm80, sm86 (8.6 to 8.9), sm90, sm100, sm120; "cpu" interprets."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return "sm86" if major == 8 and minor > 0 else f"sm{major}0"


def strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """The strides of batch, head and row of each tensor; a row's own stride is 1."""
    return tuple(s for x in tensors for s in x.stride()[:3])


def too_wide(*tensors: torch.Tensor) -> bool:
    """Does a tile of rows (at most 256) span more than 2^31 elements?"""
    return any(x.stride(2) * 256 >= 1 << 31 for x in tensors)


def fits_descriptor(x: torch.Tensor) -> bool:
    """Can a TMA descriptor describe x: 16-byte aligned address and strides, none of them 0?"""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(
        0 < s * size < 1 << 40 and s * size % 16 == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1
    )


def tile(rows: int, block_d: int, parts: int = 1) -> tuple[int, ...]:
    """The block that a descriptor loads of a tensor (batch, heads, seq, head_dim), or of its parts."""
    return (1, 1, rows, block_d) if parts == 1 else (1, 1, 1, rows, block_d)


def descriptor(x: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """x in blocks of that shape. The stride of an axis of length 1 is never taken, but must fit all the same."""
    strides = [s if n > 1 else 16 for s, n in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(block))


class SplitHeads:
    """x (batch, heads, seq, head_dim) float32 -> bfloat16 parts (parts, batch, heads, seq, head_dim)."""

    def __init__(self, maths: Maths, parts: int) -> None:
        self.maths, self.parts = maths, parts

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """Where they go."""
        padded = -(-x.shape[3] // 8) * 8  # a descriptor's rows are multiples of 16 bytes
        return torch.empty((self.parts, *x.shape[:3], padded), dtype=torch.bfloat16, device=x.device)[..., : x.shape[3]]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out, (batch, heads, seq, head_dim) = self.empty(x), x.shape
        prepare.split_heads[(triton.cdiv(seq, PREPARED_ROWS) * batch * heads,)](
            x, out, *strides(x), out.stride(0), out.stride(3), heads, seq, head_dim, PAD_D=self.maths.pad_d,
            WIDE=too_wide(x), PARTS=self.parts, BLOCK_N=PREPARED_ROWS, BLOCK_D=self.maths.block_d,
        )  # fmt: skip
        return out


class TurnHeads:
    """x (batch, heads, seq, head_dim) -> (batch, heads, head_dim, padded), as prepare.turn_heads() says."""

    def __init__(self, maths: Maths) -> None:
        self.maths = maths

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """Where it goes."""
        batch, heads, seq, head_dim = x.shape
        return torch.empty((batch, heads, head_dim, -(-seq // 8) * 8), dtype=x.dtype, device=x.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out, (batch, heads, seq, head_dim) = self.empty(x), x.shape
        prepare.turn_heads[(triton.cdiv(seq, PREPARED_ROWS) * batch * heads,)](
            x, out, *strides(x), out.stride(2), heads, seq, head_dim, PAD_D=self.maths.pad_d,
            WIDE=too_wide(x), BLOCK_N=PREPARED_ROWS, BLOCK_D=self.maths.block_d,
        )  # fmt: skip
        return out


class Prepared:
    """A launch that reads some of its tensors as a kernel before it has rewritten them (`steps`), or some of them both
    ways, the rewritten ones after the others (`more`, None where it reads no such one); both by place."""

    __slots__ = ("launch", "more", "steps")

    def __init__(
        self, launch: Launch, steps: dict[int, SplitHeads | TurnHeads], more: dict[int, TurnHeads | None] | None = None
    ) -> None:
        self.launch, self.steps, self.more = launch, steps, more or {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        read = (self.steps[n](x) if n in self.steps else x for n, x in enumerate(tensors))
        self.launch(*read, *(step and step(tensors[n]) for n, step in self.more.items()))


class Launch:
    """One kernel with all but its tensors bound. The first call compiles, later ones skip Triton's dispatch."""

    __slots__ = ("blocks", "config", "constants", "grid", "kernel", "runner", "scalars", "shells")

    def __init__(self, kernel, grid, config: TileConfig, blocks, scalars, constants: dict) -> None:
        self.kernel, self.grid, self.config = kernel, grid, config
        # What each tensor argument's descriptor loads at once; None: the kernel takes a pointer.
        self.blocks = blocks if config.tma and any(blocks) else None
        self.scalars, self.constants = scalars, constants
        self.runner = None
        self.shells: tuple[TensorDescriptor | None, ...] = ()

    def arguments(self, tensors: tuple) -> tuple[tuple, dict]:
        """The (positional, keyword) arguments of Triton's own dispatch."""
        if self.blocks is not None:
            self.shells = tuple(
                block and quick.hollow(descriptor(x, block)) for x, block in zip(tensors, self.blocks, strict=True)
            )
        positional = (*self.described(tensors), *self.scalars)
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        if self.config.max_regs:
            options["maxnreg"] = self.config.max_regs
        return positional, {**self.constants, **options}

    def described(self, tensors: tuple) -> tuple:
        """The tensors, through descriptors where this launch uses them: the first call's, moved to these addresses."""
        if not self.shells:
            return tensors
        return tuple(x if shell is None else moved(shell, x) for x, shell in zip(tensors, self.shells, strict=True))

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self.runner is not None:
            self.runner(tensors)
            return
        positional, keyword = self.arguments(tensors)
        compiled = self.kernel[self.grid](*positional, **keyword)
        if not INTERPRET:
            # The plan's key covers all that Triton specialises on, so this binary is right for every call of it.
            # Constants are bound by name above and by place here: they end the signature, in its order.
            self.scalars += tuple(self.constants[param.name] for param in self.kernel.params if param.is_constexpr)
            grid, device = (*self.grid, 1, 1), tensors[0].get_device()
            self.runner = quick.runner(compiled, grid, device, self.shells, moved, self.scalars) or self.theirs(
                compiled[grid]
            )

    def theirs(self, run) -> Callable[[tuple], None]:
        """A call of Triton's own runner."""
        return lambda tensors: run(*self.described(tensors), *self.scalars)


def moved(shell: TensorDescriptor, x: torch.Tensor) -> TensorDescriptor:
    """`shell` for x, which has its layout. Making one anew checks that again, and costs as much as the launch."""
    desc = object.__new__(TensorDescriptor)
    desc.__dict__.update(shell.__dict__, base=x)
    return desc
