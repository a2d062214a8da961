"""From validated tensors to launched kernels. A call's shape is planned once; a repeated call only launches.

`FAMILIES` maps a class of maths to its kernels. Every kernel takes one `Params` (params.cuh) by value and is compiled
for integers alone: tile, padded head_dim, and which of softcap and ALiBi it has.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from flash2.backends.cupy_cuda import compile, fp32, half, hopper
from flash2.backends.cupy_cuda.hopper import HopperTile
from flash2.backends.cupy_cuda.tiles import Family, Tile
from flash2.core.contract import TORCH_DTYPES, Spec, spec_of
from flash2.core.problem import Problem

FAMILIES: dict[str, Family] = {"fp16": half.FAMILY, "bf16": half.FAMILY, "ieee": fp32.IEEE, "tf32": fp32.TF32}
# kernel -> its name in the source
ENTRIES = {
    "forward": "cuda_attention_forward",
    "statistics": "cuda_row_statistics",
    "gradients_kv": "cuda_gradients_kv",
    "gradients_q": "cuda_gradients_q",
    "gradients": "cuda_gradients",
    "gradients_sum": "cuda_gradients_sum",
}
# The class of maths as the sources know it.
PRECISION_CODES = {"fp16": 0, "bf16": 1, "ieee": 2, "tf32": 3}
LOG2E = math.log2(math.e)
SMALLEST_NORMAL = 2.0**-126
ROWS = 128  # lse2 and delta are padded to a multiple of this, so that a tile of query rows needs no check there
# struct Params of params.cuh: pointers, then what a plan keeps.
POINTERS = struct.Struct("13Q")
CONSTANTS = struct.Struct("24q 2q 8i 3f i")
Pins = dict[str, Tile | HopperTile]  # kernel -> the tile it must run with


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, pins: Pins | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): o laid out like q, lse (batch, heads_q, seq_q) float32, natural log."""
    o, lse = output_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, v = readable(q), readable(k), readable(v)
    slopes = spec.alibi_slopes
    key = ("fwd", q.shape, q.stride(), k.shape, k.stride(), v.stride(), o.stride(), *options(spec, pins), q.dtype, q.get_device())  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = remember(key, plan_forward(q, k, v, o, spec, pins or {}))
    plan(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
        0 if slopes is None else slopes.data_ptr(), 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    return o, lse


def differentiate(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    spec: Spec, pins: Pins | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), laid out like q, k, v."""
    dq, dk, dv = output_like(q), output_like(k), output_like(v)
    do, q, k, v, o, lse = readable(do), readable(q), readable(k), readable(v), readable(o), lse.contiguous()
    slopes = spec.alibi_slopes
    key = (
        "bwd", q.shape, k.shape, *(x.stride() for x in (do, q, k, v, o, dq, dk, dv)), *options(spec, pins), q.dtype,
        q.get_device(),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = remember(key, plan_backward(do, q, k, v, o, dq, dk, dv, spec, pins or {}))
    rows = torch.empty(
        (2, q.shape[0] * q.shape[1], -(-q.shape[2] // ROWS) * ROWS), dtype=torch.float32, device=q.device
    )
    shares = torch.zeros(plan.shares, dtype=torch.float32, device=q.device) if plan.shares else None
    plan(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
        0 if slopes is None else slopes.data_ptr(), do.data_ptr(), rows.data_ptr(),
        rows.data_ptr() + rows.stride(0) * 4, dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        0 if shares is None else shares.data_ptr(),
    )  # fmt: skip
    return dq, dk, dv


_plans: dict[tuple, Plan] = {}
_PLANS_LIMIT = 1 << 12  # a decoder's seq_kv grows for ever


def remember(key: tuple, plan: Plan) -> Plan:
    """Keep `plan` for the next call of its kind."""
    if len(_plans) >= _PLANS_LIMIT:
        _plans.clear()
    _plans[key] = plan
    return plan


def output_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor laid out like x, whose rows' elements are neighbours."""
    return torch.empty_like(x) if x.stride(3) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy with rows on multiples of 16 bytes: the kernels read 16 bytes at once. Only sizes of 1 may have
    strides that do not fit."""
    per = 16 // x.element_size()
    batch, head, row, unit = x.stride()
    if x.data_ptr() % 16 == 0 and (
        (unit == 1 or x.shape[3] == 1)
        and (row % per == 0 or x.shape[2] == 1)
        and (head % per == 0 or x.shape[1] == 1)
        and (batch % per == 0 or x.shape[0] == 1)
    ):
        return x
    padded = -(-x.shape[3] // per) * per
    copy = torch.empty((*x.shape[:3], padded), dtype=x.dtype, device=x.device)[..., : x.shape[3]]
    return copy.copy_(x)


def options(spec: Spec, pins: Pins | None) -> tuple:
    """The parts of a call that are no tensors, for the plans' keys."""
    slopes = None if spec.alibi_slopes is None else spec.alibi_slopes.stride()
    return (
        spec.scale, spec.precision, spec.causal, spec.window, spec.softcap, slopes,
        None if not pins else tuple(pins.items()),
    )  # fmt: skip


class Maths:
    """What a Spec means to the kernels: folded factors, switches, sizes."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, spec: Spec, arch: int, processors: int) -> None:
        self.batch, self.heads, self.seq_q, self.head_dim = q.shape
        self.heads_kv, self.seq_kv = k.shape[1], k.shape[2]
        self.family = FAMILIES[spec.precision]
        self.precision, self.arch, self.processors = spec.precision, arch, processors
        left, right = spec.band
        # A band wider than the problem is no band: the last query sees key 0, the first the last key.
        self.banded = (left is not None and left < self.seq_kv - 1) or (right is not None and right < self.seq_q - 1)
        self.left = self.seq_kv if left is None else min(left, self.seq_kv)
        self.right = self.seq_q if right is None else min(right, self.seq_q)
        self.softcap, self.alibi = spec.softcap != 0, spec.alibi_slopes is not None
        self.scale = spec.scale / spec.softcap if spec.softcap else spec.scale * LOG2E
        self.cap, self.dscale = spec.softcap * LOG2E, spec.scale
        # Multiplying after the maximum needs a factor that is positive and that float32 does not flush to 0.
        self.fold = not (self.softcap or self.alibi) and self.scale >= SMALLEST_NORMAL
        self.block_d = min(d for d in self.family.head_dims if d >= self.head_dim)
        self.hopper = hopper.suits(self)
        self.rows_padded = -(-self.seq_q // ROWS) * ROWS
        self.parts = 0  # of the keys, whose shares of dQ are kept apart
        slopes = spec.alibi_slopes
        self.slope_strides = (0, 0) if slopes is None else (0, *slopes.stride())[-2:]

    def gradients(self, pins: Pins) -> list[str]:
        """The kernels of the backward in their order; sets `parts` for those that add up shares of dQ.

        ValueError for a pinned tile that no such kernel has.
        """
        if not pins.keys() & {"gradients_kv", "gradients_q"}:
            self.parts = self.family.parts(self, pins.get("gradients"))
        if "gradients" in pins and not self.parts:
            raise ValueError(f"tile {pins['gradients']} does not suit: no kernel has both sides' gradients here")
        return ["statistics", *(("gradients", "gradients_sum") if self.parts else ("gradients_kv", "gradients_q"))]

    @property
    def shares(self) -> tuple[int, ...]:
        """The shape of Params' shares, float32; empty if there are none."""
        return (self.batch * self.heads, self.parts, self.rows_padded, self.block_d) if self.parts else ()

    def kernel(self, name: str, pins: Pins) -> Kernel:
        """Kernel `name` on these sizes, in the tile that is pinned or that the family's table says.

        ValueError for a pinned tile of Hopper's that does not suit.
        """
        tile = pins.get(name)
        if isinstance(tile, HopperTile) and not (self.hopper and name == "forward"):
            raise ValueError(
                f"tile {tile} does not suit: it is for the forward of fp16 and bf16 on compute capability 9.0"
            )
        if tile is None:
            tile = hopper.tile(self) if self.hopper and name == "forward" else self.family.tile(name, self)
        if isinstance(tile, HopperTile):
            blocks = min(-(-self.seq_q // tile.block_m) * self.batch * self.heads, self.processors)
            defines = {"PRECISION": PRECISION_CODES[self.precision], **hopper.defines(tile, self)}
            return Kernel(
                name=name, source=hopper.SOURCE, tile=tile, defines=defines, shared=defines["SHARED"], grid=blocks,
                threads=32 * tile.warps,
            )  # fmt: skip
        over_keys = name in ("gradients_kv", "gradients")
        rows, heads = (self.seq_kv, self.heads_kv) if over_keys else (self.seq_q, self.heads)
        block = tile.block_n if over_keys else tile.block_m
        if name == "statistics":
            rows = self.rows_padded
        blocks = self.parts if name == "gradients" else -(-rows // block)
        shared = self.family.shared(name, tile, self.block_d)
        defines = {
            "PRECISION": PRECISION_CODES[self.precision], "BLOCK_D": self.block_d, "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n, "WARPS": tile.warps, "STAGES": tile.stages, "SHARED": shared,
        }  # fmt: skip
        if name == "gradients":
            defines["SHARES"] = 1
        if name not in ("statistics", "gradients_sum"):
            defines |= {"SOFTCAP": int(self.softcap), "ALIBI": int(self.alibi), "FOLD": int(self.fold)}
        return Kernel(
            name=name, source=self.family.sources[name], tile=tile, defines=defines, shared=shared,
            grid=blocks * self.batch * heads, threads=32 * tile.warps,
        )  # fmt: skip

    def constants(self, *tensors: torch.Tensor | None) -> bytes:
        """The part of Params that a plan keeps; tensors are q k v o do dq dk dv, None where a pass has none."""
        strides = [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]
        return CONSTANTS.pack(
            *strides, *self.slope_strides, self.heads, self.heads // self.heads_kv, self.seq_q, self.seq_kv,
            self.rows_padded, self.head_dim, self.left, self.right, self.scale, self.cap, self.dscale, self.parts,
        )  # fmt: skip


def plan_forward(q, k, v, o, spec: Spec, pins: Pins) -> Plan:
    """The forward launch for tensors laid out like these."""
    maths = Maths(q, k, spec, arch_of(q.device), processors_of(q.device))
    maths.hopper = maths.hopper and all(hopper.describable(x) for x in (q, k, v, o))
    kernel = maths.kernel("forward", pins)
    constants = maths.constants(q, k, v, o, None, None, None, None)
    if not isinstance(kernel.tile, HopperTile):
        return Plan([kernel], constants, q.device)
    return HopperPlan(kernel, constants, maths, (q, k, v))


def plan_backward(do, q, k, v, o, dq, dk, dv, spec: Spec, pins: Pins) -> Plan:
    """The backward launches, in their order, for tensors laid out like these."""
    maths = Maths(q, k, spec, arch_of(q.device), processors_of(q.device))
    kernels = [maths.kernel(name, pins) for name in maths.gradients(pins)]
    return Plan(kernels, maths.constants(q, k, v, o, do, dq, dk, dv), q.device, maths.shares)


def maths_of(problem: Problem, arch: int) -> Maths:
    """Of contiguous tensors of `problem` on compute capability `arch` (90 for 9.0), with an H100's multiprocessors."""
    with torch.device("meta"):
        dtype = TORCH_DTYPES[problem.dtype]
        q = torch.empty(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, dtype=dtype)
        k = torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, dtype=dtype)
        slopes = torch.empty(problem.heads_q) if problem.alibi else None
    return Maths(q, k, spec_of(problem, slopes), arch, hopper.PROCESSORS)


def kernels_of(problem: Problem, arch: int, pins: Pins) -> list[Kernel]:
    """What such tensors would launch, in order."""
    maths = maths_of(problem, arch)
    names = ["forward"] if problem.pass_ != "bwd" else []
    names += maths.gradients(pins) if problem.pass_ != "fwd" else []
    return [maths.kernel(name, pins) for name in names]


def bytes_of_shares(problem: Problem, pins: Pins) -> int:
    """What the backward's shares of dQ take on an H100."""
    maths = maths_of(problem, 90)
    maths.gradients(pins)
    return 4 * math.prod(maths.shares) if maths.shares else 0


def described(problem: Problem, device: torch.device, pins: Pins) -> list[str]:
    """One line a kernel: its source, its tile, and the seconds NVRTC took, which it takes here if it has not yet."""
    arch = compile.arch_name(torch.cuda.get_device_capability(device))
    lines = []
    for kernel in kernels_of(problem, arch_of(device), pins):
        seconds = compile.cubin(kernel.source, kernel.defines, arch).seconds
        lines.append(f"{kernel.name}: {kernel.source} {kernel.tile} for {arch}, compiled in {seconds:.2f} s")
    return lines


def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def processors_of(device: torch.device) -> int:
    """How many multiprocessors it has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(slots=True, kw_only=True)
class Kernel:
    """One kernel with all that its launch needs beside Params; `load` compiles it."""

    name: str
    source: str
    tile: Tile | HopperTile
    defines: dict[str, int]
    grid: int
    threads: int
    shared: int
    function: int = 0  # the driver's handle, after load()
    keep: Any = field(default=None, repr=False)  # CuPy's module, which unloads the code when it goes

    def load(self, device: torch.device) -> None:
        """Compile, or take from the cache, and load on `device`, which is current."""
        module = module_of(self.source, tuple(sorted(self.defines.items())), device)
        kernel = module.get_function(ENTRIES[self.name])
        if self.shared > 48 * 1024:  # beyond that a kernel must ask
            kernel.max_dynamic_shared_size_bytes = self.shared
        self.keep, self.function = kernel, kernel.kernel.ptr


_modules: dict[tuple, Any] = {}


def module_of(source: str, defines: tuple[tuple[str, int], ...], device: torch.device):
    """CuPy's module of `source` with `defines` on `device`."""
    import cupy

    key = (source, defines, device.index)
    if key not in _modules:
        arch = compile.arch_name(torch.cuda.get_device_capability(device))
        _modules[key] = cupy.RawModule(path=str(compile.cubin(source, dict(defines), arch).path))
    return _modules[key]


class Plan:
    """Kernels that run one after the other on the same Params, of which a call fills in the pointers."""

    __slots__ = ("arguments", "context", "device", "kernels", "launch", "lock", "memory", "place", "pointer", "shares")
    head = 0  # bytes before Params in what the kernels are handed

    def __init__(
        self, kernels: list[Kernel], constants: bytes, device: torch.device, shares: tuple[int, ...] = ()
    ) -> None:
        self.kernels, self.device, self.shares = kernels, device, shares
        size = self.head + POINTERS.size + len(constants)
        self.memory = ctypes.create_string_buffer(size + 64)
        begin = -ctypes.addressof(self.memory) % 64  # where tensor maps may stand
        self.place = begin + self.head
        self.memory[self.place + POINTERS.size : begin + size] = constants
        self.pointer = ctypes.c_void_p(ctypes.addressof(self.memory) + begin)
        self.arguments = ctypes.addressof(self.pointer)  # the driver's void **kernelParams, of one parameter
        self.lock = threading.Lock()  # autograd's thread and the caller's share the memory
        self.launch: Callable | None = None
        self.context: Callable | None = None

    def fill(self, pointers: tuple[int, ...]) -> None:
        """Put a call's pointers where the kernels are handed them."""
        POINTERS.pack_into(self.memory, self.place, *pointers)

    def __call__(self, *pointers: int) -> None:
        if self.launch is None:
            self.load()
        if not self.context():  # a thread of autograd's that has not asked the runtime for anything yet
            enter_context(self.device)
        launch, arguments = self.launch, self.arguments
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with self.lock:
            self.fill(pointers)
            for kernel in self.kernels:  # the driver copies the parameters before it returns
                launch(kernel.function, kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, arguments, 0)

    def load(self) -> None:
        """Compile and load every kernel."""
        # CuPy's own binding of cuLaunchKernel: its RawKernel would look at every argument's type in every call.
        from cupy_backends.cuda.api import driver

        enter_context(self.device)
        for kernel in self.kernels:
            kernel.load(self.device)
        self.launch, self.context = driver.launchKernel, driver.ctxGetCurrent


class HopperPlan(Plan):
    """A forward whose Params stand between the tensor maps of q, k and v, and the order of its row tiles."""

    __slots__ = ("maps", "move", "order")
    head = hopper.HEAD

    def __init__(self, kernel: Kernel, constants: bytes, maths: Maths, tensors: tuple[torch.Tensor, ...]) -> None:
        tile = kernel.tile
        rounds, table = hopper.order(maths, tile, kernel.grid)
        self.order = torch.tensor(table, dtype=torch.int32, device=tensors[0].device) if table else None
        row_tiles = -(-maths.seq_q // tile.block_m) * maths.batch * maths.heads
        tail = hopper.TAIL.pack(0 if self.order is None else self.order.data_ptr(), rounds, row_tiles)
        super().__init__([kernel], constants + tail, tensors[0].device)
        self.maps = [self.pointer.value + n * hopper.MAP for n in range(3)]
        for place, x, rows in zip(self.maps, tensors, (tile.block_m, tile.block_n, tile.block_n), strict=True):
            hopper.encode(place, x, rows)
        self.move = hopper.mover()

    def fill(self, pointers: tuple[int, ...]) -> None:
        """As Plan does, and the addresses of q, k and v into their maps."""
        move, (q, k, v) = self.move, self.maps
        if move(q, pointers[0]) or move(k, pointers[1]) or move(v, pointers[2]):
            raise RuntimeError("cuTensorMapReplaceAddress refuses an address")
        POINTERS.pack_into(self.memory, self.place, *pointers)


def enter_context(device: torch.device) -> None:
    """Make the context of `device`, which torch shares, this thread's: the driver's own launch does not."""
    from cupy_backends.cuda.api import runtime

    runtime.setDevice(device.index)
    runtime.free(0)  # before CUDA 12 setDevice alone left it to the next call


def parse_tile(text: str) -> Tile | HopperTile:
    """'128x64 w4 s2' as a Tile: rows, keys, warps, stages; or a HopperTile. ValueError for another form."""
    if (found := hopper.parse(text)) is not None:
        return found
    match = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)", text.strip())
    if match is None:
        raise ValueError(
            f"tile {text!r} is not of the form '128x64 w4 s2' (rows x keys, warps, stages) or 'wgmma 128x128 s2 q2' "
            f"(rows x keys, stages of K and V, of Q) with any of {', '.join(hopper.FLAGS)}"
        )
    block_m, block_n, warps, stages = map(int, match.groups())
    return Tile(block_m=block_m, block_n=block_n, warps=warps, stages=stages)
