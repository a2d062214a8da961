"""From validated tensors to launched kernels. A call's shape is planned once; a repeated call only launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from flash2.backends.gluon_hopper import configs, forward, schedule
from flash2.backends.gluon_hopper.compat import ROOMY, TensorDescriptor, gl
from flash2.backends.gluon_hopper.configs import ForwardConfig
from flash2.core import quick
from flash2.core.contract import Spec, spec_of
from flash2.core.problem import Problem

T = TypeVar("T")
LOG2E = math.log2(math.e)
SMALLEST_NORMAL = 2.0**-126
FAR = 1 << 30  # further than any key
WIDTH = 8  # elements of 16 bits in the 16 bytes that TMA's addresses and strides are multiples of


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, config: ForwardConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): o laid out like q, its rows padded to 16 bytes; lse (batch, heads_q, seq_q) float32, natural log."""
    call_key = ("fwd", layout(q), layout(k), layout(v), spec.scale, spec.causal, spec.window, spec.softcap, config,
                q.dtype, q.get_device())  # fmt: skip
    plan = _plans.get(call_key)
    if plan is None:
        plan = remember(call_key, plan_forward(q, k, v, spec, config))
    return plan(q, k, v)


_plans: dict[tuple, Any] = {}
_PLANS_LIMIT = 1 << 12  # a decoder's seq_kv grows for ever


def remember(call_key: tuple, plan: T) -> T:
    """Keep `plan` for the next call of its kind."""
    if len(_plans) >= _PLANS_LIMIT:
        _plans.clear()
    _plans[call_key] = plan
    return plan


# ---- what TMA can read


def layout(x: torch.Tensor) -> tuple:
    """What a plan depends on: the shape, the strides, and whether the address is a multiple of 16 bytes."""
    return x.shape, x.stride(), x.data_ptr() % 16 == 0


def describable(x: torch.Tensor) -> bool:
    """Can a descriptor describe x as it lies? 16-byte aligned address and strides, none of them 0, rows dense."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    dense = x.stride(3) == 1 or x.shape[3] == 1
    return dense and x.data_ptr() % 16 == 0 and all(0 < s < 1 << 39 and s % WIDTH == 0 for s in strides)


def empty_rows(shape: torch.Size | tuple, like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of this shape, but for rows that are padded to a multiple of 16 bytes."""
    *outer, head_dim = shape
    padded = -(-head_dim // WIDTH) * WIDTH
    return torch.empty((*outer, padded), dtype=like.dtype, device=like.device)[..., :head_dim]


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that TMA can read."""
    return x if describable(x) else empty_rows(x.shape, x).copy_(x)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A tensor like x, which is readable, that TMA can write."""
    out = torch.empty_like(x)
    return out if describable(out) else empty_rows(x.shape, x)


def unexpanded(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y (k and v), with their first element alone along batch or heads where both repeat it with stride 0."""
    for axis in (0, 1):
        if x.shape[axis] > 1 and x.stride(axis) == 0 == y.stride(axis):
            x, y = x.narrow(axis, 0, 1), y.narrow(axis, 0, 1)
    return x, y


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x (batch, heads, seq, head_dim) in tiles of `rows` rows and `columns` columns, what lies past its end being 0."""
    # The stride of an axis of length 1 is never taken, but must fit all the same.
    strides = [s if n > 1 else WIDTH for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], swizzled)


def moved(shell: TensorDescriptor, x: torch.Tensor) -> TensorDescriptor:
    """`shell` for x, which has its layout. Making one anew checks that again, and costs as much as the launch."""
    desc = object.__new__(TensorDescriptor)
    desc.__dict__.update(shell.__dict__, base=x)
    return desc


class Launch:
    """One kernel with all but its tensors bound. The first call compiles, later ones skip Triton's dispatch.

    tiles: for each tensor argument the (rows, columns) that its descriptor moves at once, None for a pointer.
    The kernel's signature is tensors, scalars, constants, in this order.
    """

    __slots__ = ("constants", "grid", "kernel", "options", "runner", "scalars", "shells", "tiles")

    def __init__(
        self, kernel, grid: tuple[int, ...], tiles: tuple, scalars: tuple, constants: dict, options: dict | None = None
    ) -> None:
        self.kernel, self.grid, self.tiles, self.scalars, self.constants = kernel, grid, tiles, scalars, constants
        self.options = options or {"num_warps": 4}
        self.runner = None
        self.shells: tuple[TensorDescriptor | None, ...] = ()

    @staticmethod
    def describe(x: torch.Tensor, tile: tuple[int, ...]) -> TensorDescriptor:
        """The descriptor that moves `tile` of x at once."""
        return descriptor(x, *tile)

    def arguments(self, tensors: tuple) -> tuple[tuple, dict]:
        """The (positional, keyword) arguments of Triton's own dispatch."""
        self.shells = tuple(
            tile and quick.hollow(self.describe(x, tile)) for x, tile in zip(tensors, self.tiles, strict=True)
        )
        return (*self.described(tensors), *self.scalars), {**self.constants, **self.options}

    def described(self, tensors: tuple) -> tuple:
        """The tensors, through the first call's descriptors moved to these addresses."""
        return tuple(x if shell is None else moved(shell, x) for x, shell in zip(tensors, self.shells, strict=True))

    def __call__(self, *tensors: torch.Tensor) -> None:
        if self.runner is not None:
            self.runner(tensors)
            return
        positional, keyword = self.arguments(tensors)
        compiled = self.kernel[self.grid](*positional, **keyword)
        # The plan's key covers all that Triton specialises on, so this binary is right for every call of it.
        # Constants are bound by name above and by place here: they end the signature, in its order.
        self.scalars += tuple(self.constants[param.name] for param in self.kernel.params if param.is_constexpr)
        grid, device = (*self.grid, 1, 1)[:3], tensors[0].get_device()
        quickly = quick.runner(compiled, grid, device, self.shells, moved, self.scalars)
        self.runner = quickly or self.theirs(compiled[grid])

    def theirs(self, run: Callable) -> Callable[[tuple], None]:
        """A call of Triton's own runner."""
        return lambda tensors: run(*self.described(tensors), *self.scalars)


# ---- the forward


class Band(NamedTuple):
    """Which keys each query sees, as forward.py counts them: from the start of key tile 0."""

    seq_q: int
    keys: int  # one past the last key
    pad: int  # where key 0 stands
    diagonal: int  # query i sees positions below i + diagonal
    leftmost: int  # and from i + leftmost on
    left: bool  # is there an edge on the left that a tile must be masked for?
    right: bool
    tail: bool  # does a tile of the right edge reach past the last key for a row that would see it?

    def tiles(self, row0: int, rows: int, block_n: int) -> int:
        """How many key tiles the query rows row0.. see; forward.key_tiles() in Python."""
        hi = min(self.keys, min(row0 + rows, self.seq_q) - 1 + self.diagonal) if self.right else self.keys
        lo = max(self.pad, row0 + self.leftmost) if self.left else 0
        return -(-hi // block_n) - lo // block_n if hi > lo else 0

    @property
    def empty_rows(self) -> int:
        """How many of the first queries see no key."""
        return min(max(0, self.pad + 1 - self.diagonal), self.seq_q) if self.right else 0


def band_of(spec: Spec, seq_q: int, seq_kv: int, block_n: int) -> Band:
    """The Band of a Spec. A band wider than the problem is no band: the last query sees key 0, the first the last key."""
    left, right = spec.band
    left = None if left is None or left >= seq_kv - 1 else left
    right = None if right is None or right >= seq_q - 1 else right
    offset = seq_kv - seq_q  # bottom-right: row i sees keys up to i + offset + right (flash-attention >= 2.1)
    # Tiles begin so many keys before the first that the right edges of a group of 64 rows fall into one tile.
    pad = 0 if right is None else -(offset + right) % 64
    return Band(
        seq_q=seq_q, keys=seq_kv + pad, pad=pad, diagonal=0 if right is None else offset + right + 1 + pad,
        leftmost=-FAR if left is None else offset + pad - left, left=left is not None or pad > 0,
        right=right is not None, tail=right != 0 and (right is not None or seq_kv % block_n != 0),
    )  # fmt: skip


class ForwardPlan:
    """One forward with all but its tensors bound."""

    __slots__ = ("copied", "empty", "launch", "new_o", "table", "unexpanded")

    def __init__(
        self, launch: Launch, table: torch.Tensor | None, empty: int, copied: bool, unexpanded: bool, new_o: Callable
    ) -> None:
        self.launch, self.table, self.empty = launch, table, empty
        self.copied, self.unexpanded, self.new_o = copied, unexpanded, new_o

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.unexpanded:
            k, v = unexpanded(k, v)
        if self.copied:
            q, k, v = readable(q), readable(k), readable(v)
        o = self.new_o(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if self.empty:  # whole groups of rows that the kernel passes over
            o[:, :, : self.empty].zero_()
            lse[:, :, : self.empty].fill_(-torch.inf)
        self.launch(q, k, v, o, lse, lse if self.table is None else self.table)
        return o, lse


def plan_forward(q, k, v, spec: Spec, config: ForwardConfig | None = None) -> ForwardPlan:
    """The forward for tensors laid out like these; None: the configuration that configs.forward() names."""
    batch, heads, seq_q, head_dim = q.shape
    heads_kv, seq_kv = k.shape[1], k.shape[2]
    config = config or chosen(spec, q.shape, seq_kv)
    width, block_m, block_n = configs.block_d(head_dim), config.block_m, config.block_n
    band = band_of(spec, seq_q, seq_kv, block_n)
    rows, row_tiles = batch * heads, triton.cdiv(seq_q, block_m)
    one_k, one_v = unexpanded(k, v)
    blocks = min(row_tiles * rows, config.blocks * multiprocessors(q.device))
    together = max(1, schedule.L2_SHARE // (4 * band.keys * head_dim)) * (heads // heads_kv)
    work = [band.tiles(m * block_m, block_m, block_n) + 0.9 for m in range(row_tiles)]
    table, rounds = planned(work, rows, blocks, together, q.device)
    scale, cap = spec.scale * LOG2E, 0.0
    if spec.softcap:
        scale, cap = 2.0 * scale / spec.softcap, spec.softcap * LOG2E
    # Multiplying after the maximum needs a factor whose sign is known and that float32 does not flush to 0.
    fold = not spec.softcap and abs(scale) >= SMALLEST_NORMAL
    launch = Launch(
        forward.gluon_attention_forward,
        (blocks,),
        ((64, width), (block_n, width), (block_n, width), (64, width), None, None),
        (rounds, row_tiles, rows, heads, heads // one_k.shape[1], batch // one_k.shape[0], *band[:5],
         abs(scale) if fold else scale, cap),
        {
            "LEFT": band.left, "RIGHT": band.right, "TAIL": band.tail,
            "FOLD": fold, "NEGATE": fold and scale < 0, "SOFTCAP": spec.softcap != 0,
            "GROUPS": config.groups, "BLOCK_N": block_n, "BLOCK_D": width, "KV_SLOTS": config.kv_slots,
            "Q_SLOTS": config.q_slots, "TURNS": config.turns, "ORDERED": config.ordered, "Q_COLUMNS": config.q_columns,
            "OVERLAP": config.overlap, "PLANNED": table is not None, "REGISTERS": config.registers,
        },
        config.options,
    )  # fmt: skip
    copied = not all(map(describable, (q, one_k, one_v)))
    # What is allocated for a readable q begins on a multiple of 16 bytes; its strides are then all that counts.
    new_o = torch.empty_like if not copied and describable(torch.empty_like(q, device="meta")) else empty_like
    return ForwardPlan(launch, table, band.empty_rows // 64 * 64, copied, one_k is not k, new_o)


def chosen(spec: Spec, q_shape: torch.Size | tuple, seq_kv: int) -> ForwardConfig:
    """The configuration of a forward."""
    band = band_of(spec, q_shape[2], seq_kv, 128)
    ragged = band.left or (band.tail and not band.right)
    return configs.forward(q_shape[3], causal=band.right, ragged=ragged, seq=seq_kv, roomy=ROOMY)


_multiprocessors: dict[torch.device, int] = {}


def multiprocessors(device: torch.device) -> int:
    """Of a device; of an H200 for the meta device, which builds kernels without a GPU."""
    if device.type != "cuda":
        return 132
    if device not in _multiprocessors:
        _multiprocessors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _multiprocessors[device]


# Kept for good, because a captured CUDA graph reads them after their plans are forgotten; so their size has a limit.
_tables: dict[tuple, tuple[torch.Tensor, int]] = {}
_TABLES_LIMIT = 16 << 20  # entries of 4 bytes


def planned(
    work: Sequence[float], rows: int, blocks: int, together: int, device: torch.device
) -> tuple[torch.Tensor | None, int]:
    """(table, rounds) of schedule.plan(), on the device; (None, 0) where tiles cost the same or there is no table."""
    if len(set(work)) == 1 or not schedule.fits(len(work), rows):
        return None, 0
    key = (tuple(work), rows, blocks, together, device)
    if key not in _tables:
        if sum(table.numel() for table, _ in _tables.values()) > _TABLES_LIMIT:
            return None, 0
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None, 0  # a copy from the host has no place in a graph
        entries, rounds = schedule.plan(work, rows, blocks, min(together, rows))
        _tables[key] = torch.tensor(entries, dtype=torch.int32, device=device), rounds
    return _tables[key]


def described(problem: Problem, device: torch.device) -> list[str]:
    """The configurations that a call for `problem` runs with."""
    spec = spec_of(problem.replace(alibi=False))
    shape = (problem.batch, problem.heads_q, problem.seq_q, problem.head_dim)
    lines = [f"forward: {chosen(spec, shape, problem.seq_kv)}"]
    if problem.head_dim != (width := configs.block_d(problem.head_dim)):
        lines.append(f"head_dim {problem.head_dim} is computed as {width}")
    if problem.head_dim % WIDTH:
        lines.append(
            f"head_dim {problem.head_dim} is no multiple of {WIDTH}: q, k and v are copied to padded rows first"
        )
    return lines
