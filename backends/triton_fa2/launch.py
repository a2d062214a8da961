"""From validated tensors to launched kernels. A call's shape is planned once; a repeated call only launches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flash2.backends.triton_fa2 import backward, configs, forward
from flash2.backends.triton_fa2.configs import Key, TileConfig
from flash2.backends.triton_fa2.tiles import INTERPRET
from flash2.core.contract import Spec

LOG2E = math.log2(math.e)
SMALLEST_NORMAL = 2.0**-126
Pins = dict[str, TileConfig]  # kernel name -> the configuration it must run with


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, pins: Pins | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): o laid out like q, lse (batch, heads_q, seq_q) float32, natural log."""
    q, k, v = rows_dense(q), rows_dense(k), rows_dense(v)
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    call_key = ("fwd", layout(q), layout(k), layout(v), o.stride(), *options(spec, pins), q.dtype, q.get_device())
    plan = _plans.get(call_key)
    if plan is None:
        plan = _plans[call_key] = plan_forward(q, k, v, o, spec, pins or {})
    plan(q, k, v, o, lse, spec.alibi_slopes)
    return o, lse


def differentiate(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    spec: Spec, pins: Pins | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), laid out like q, k, v."""
    do, q, k, v, o, lse = rows_dense(do), rows_dense(q), rows_dense(k), rows_dense(v), rows_dense(o), lse.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call_key = ("bwd", layout(do), layout(q), layout(k), layout(v), layout(o), dq.stride(), dk.stride(), dv.stride(),
                *options(spec, pins), q.dtype, q.get_device())  # fmt: skip
    plan = _plans.get(call_key)
    if plan is None:
        plan = _plans[call_key] = plan_backward(do, q, k, v, o, dq, dk, dv, spec, pins or {})
    rows_padded, statistics, gradients_kv, gradients_q = plan
    lse2, delta = torch.empty((2, q.shape[0] * q.shape[1], rows_padded), dtype=torch.float32, device=q.device)
    statistics(o, do, lse, lse2, delta)
    gradients_kv(q, k, v, do, lse2, delta, dk, dv, spec.alibi_slopes)
    gradients_q(q, k, v, do, lse2, delta, dq, spec.alibi_slopes)
    return dq, dk, dv


_plans: dict[tuple, Callable] = {}


def rows_dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where a row's elements are not neighbours: a kernel reads 16 bytes at once."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def layout(x: torch.Tensor) -> tuple:
    """What a compiled kernel depends on: the shape, the strides, and whether the address is a multiple of 16."""
    return x.shape, x.stride(), x.data_ptr() % 16 == 0


def options(spec: Spec, pins: Pins | None) -> tuple:
    """The parts of a call that are no tensors, for the plans' keys."""
    slopes = None if spec.alibi_slopes is None else (spec.alibi_slopes.stride(), spec.alibi_slopes.data_ptr() % 16 == 0)
    return (
        spec.scale, spec.precision, spec.causal, spec.window, spec.softcap, slopes,
        None if pins is None else tuple(sorted(pins.items(), key=lambda item: item[0])),
    )  # fmt: skip


def plan_forward(q, k, v, o, spec: Spec, pins: Pins) -> Callable:
    """The forward launch for tensors laid out like these."""
    maths = Maths(q, k, spec)
    config = maths.config("fwd", pins, (q, k, v))
    seq_kv = k.shape[2]
    scale, fold, negate = maths.scale, maths.fold, maths.scale < 0 and maths.fold
    return Launch(
        forward.attention_forward,
        (triton.cdiv(q.shape[2], config.block_m) * q.shape[0] * q.shape[1],),
        config,
        (config.block_m, config.block_n, config.block_n, None, None, None),
        (*strides(q, k, v, o), *maths.slope_strides, *maths.sizes, maths.left, maths.right,
         abs(scale) if negate else scale, maths.cap),
        dict(maths.features, FOLD=fold, NEGATE=negate, UNEVEN=seq_kv % config.block_n != 0,
             TAIL=maths.tail(config), PAD_D=maths.pad_d, WIDE=too_wide(q, k, v, o), PRECISION=maths.precision,
             TMA=config.tma, WS=config.ws, ONE_LOOP=config.one_loop, STAGES=config.num_stages, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=maths.block_d),
        maths.block_d,
    )  # fmt: skip


def plan_backward(do, q, k, v, o, dq, dk, dv, spec: Spec, pins: Pins) -> tuple[int, Callable, Callable, Callable]:
    """(rows of the statistics per head, and the three launches) for tensors laid out like these."""
    maths = Maths(q, k, spec)
    kv, qs = maths.config("dkdv", pins, (q, k, v, do)), maths.config("dq", pins, (q, k, v, do))
    heads, group, seq_q, seq_kv, head_dim = maths.sizes
    step = max(kv.block_m, qs.block_m)
    rows_padded = triton.cdiv(seq_q, step) * step
    block = 32 if maths.block_d > 64 else 64
    wide = too_wide(do, q, k, v, o, dq, dk, dv)
    shared = dict(maths.features, PAD_D=maths.pad_d, WIDE=wide, PRECISION=maths.precision, BLOCK_D=maths.block_d)
    statistics = Launch(
        backward.row_statistics,
        (triton.cdiv(rows_padded, block) * q.shape[0] * heads,),
        TileConfig(block_m=block, block_n=0, num_warps=4, num_stages=1),
        (None,) * 5,
        (*strides(o, do), heads, seq_q, rows_padded, head_dim),
        {"PAD_D": maths.pad_d, "WIDE": wide, "BLOCK_M": block, "BLOCK_D": maths.block_d},
        maths.block_d,
    )
    gradients_kv = Launch(
        backward.gradients_kv,
        (triton.cdiv(seq_kv, kv.block_n) * k.shape[0] * k.shape[1],),
        kv,
        (kv.block_m, kv.block_n, kv.block_n, kv.block_m, kv.block_m, kv.block_m, None, None, None),
        (*strides(q, k, v, do, dk, dv), *maths.slope_strides, k.shape[1], group, seq_q, seq_kv, rows_padded, head_dim,
         maths.left, maths.right, maths.scale, maths.cap, spec.scale),
        dict(shared, UNEVEN=seq_q % kv.block_m != 0, TMA=kv.tma, ONE_LOOP=kv.one_loop, STAGES=kv.num_stages,
             BLOCK_M=kv.block_m, BLOCK_N=kv.block_n),
        maths.block_d,
    )  # fmt: skip
    gradients_q = Launch(
        backward.gradients_q,
        (triton.cdiv(seq_q, qs.block_m) * q.shape[0] * heads,),
        qs,
        (qs.block_m, qs.block_n, qs.block_n, qs.block_m, qs.block_m, qs.block_m, None, None),
        (*strides(q, k, v, do, dq), *maths.slope_strides, heads, group, seq_q, seq_kv, rows_padded, head_dim,
         maths.left, maths.right, maths.scale, maths.cap, spec.scale),
        dict(shared, UNEVEN=seq_kv % qs.block_n != 0, TAIL=maths.tail(qs), TMA=qs.tma, ONE_LOOP=qs.one_loop,
             STAGES=qs.num_stages, BLOCK_M=qs.block_m, BLOCK_N=qs.block_n),
        maths.block_d,
    )  # fmt: skip
    return rows_padded, statistics, gradients_kv, gradients_q


class Maths:
    """What a Spec means to the kernels: folded factors, switches, and the keys of the configurations."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, spec: Spec) -> None:
        heads, seq_q, head_dim = q.shape[1:]
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
        self.arch = arch_of(q.device)

    def tail(self, config: TileConfig) -> bool:
        """Must keys past seq_kv be masked? A causal mask hides them from every row there is."""
        causal = self.features["RIGHT"] and self.right == 0
        return self.sizes[3] % config.block_n != 0 and not causal

    def config(self, kernel: str, pins: Pins, operands: tuple[torch.Tensor, ...]) -> TileConfig:
        """The configuration of `kernel`, without tensor descriptors where the operands' strides forbid them."""
        config = pins.get(kernel) or configs.choose(self.key(kernel))[0]
        return config if not config.tma or all(map(fits_descriptor, operands)) else config.replace(tma=False, ws=False)

    def key(self, kernel: str) -> Key:
        """What the table of configurations is asked for."""
        return Key(
            kernel=kernel, arch=self.arch, precision=self.spec_precision, block_d=self.block_d,
            masked=self.features["LEFT"] or self.features["RIGHT"],
            seq="short" if max(self.sizes[2:4]) <= 1024 else "long",
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


def descriptor(x: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """x (batch, heads, seq, head_dim) in tiles of `rows` rows of one head, or the statistics (heads, seq) in runs."""
    if x.dim() == 2:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows])
    # The stride of an axis of length 1 is never taken, but must be a multiple of 16 bytes all the same.
    strides = [s if n > 1 else 16 for s, n in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, rows, block_d])


class Launch:
    """One kernel with all but its tensors bound. The first call compiles, later ones skip Triton's dispatch."""

    __slots__ = ("block_d", "config", "constants", "grid", "kernel", "runner", "scalars", "tiles")

    def __init__(self, kernel, grid, config: TileConfig, tiles, scalars, constants: dict, block_d: int) -> None:
        self.kernel, self.grid, self.config = kernel, grid, config
        # Rows of each tensor argument's tile where it goes through a descriptor.
        self.tiles = tiles if config.tma and any(tiles) else None
        self.scalars, self.constants, self.block_d = scalars, constants, block_d
        self.runner = None

    def arguments(self, tensors: tuple) -> tuple[tuple, dict]:
        """The (positional, keyword) arguments of Triton's own dispatch."""
        positional = (*self.described(tensors), *self.scalars)
        return positional, {**self.constants, "num_warps": self.config.num_warps, "num_stages": self.config.num_stages}

    def described(self, tensors: tuple) -> tuple:
        """The tensors, through descriptors where this launch uses them."""
        if self.tiles is None:
            return tensors
        return tuple(
            x if rows is None else descriptor(x, rows, self.block_d)
            for x, rows in zip(tensors, self.tiles, strict=True)
        )

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self.runner is not None:
            self.runner(*self.described(tensors), *self.scalars)
            return
        positional, keyword = self.arguments(tensors)
        compiled = self.kernel[self.grid](*positional, **keyword)
        if not INTERPRET:
            # The plan's key covers all that Triton specialises on, so this binary is right for every call of it.
            # Constants are bound by name above and by place here: they end the signature, in its order.
            self.scalars += tuple(self.constants[param.name] for param in self.kernel.params if param.is_constexpr)
            self.runner = compiled[(*self.grid, 1, 1)]
