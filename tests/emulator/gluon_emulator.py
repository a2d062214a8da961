"""The Gluon subset that the Hopper kernels use, run on a CPU by machine.py: the kernels' own source, launched as ever.

A kernel function becomes plain Python whose global names are looked up here: gl, tl, tma, mbarrier and wgmma mean the
machine's, other kernel functions are translated in turn. A fault to plant is an edit of one function's text.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from emulator.machine import Allocation, Hazard, Machine, Mbarriers, Partition, Shared, block, learn
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction, JITFunction

DTYPES = {
    getattr(gl, name): getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
} | {gl.int1: torch.bool}
BAR = re.compile(r"bar\.(?P<kind>sync|arrive)\s+(?P<id>\S+?),\s*(?P<threads>\d+)")


# ------------------------------------------------------------------------------------------------ values


class Scalar(int):
    """An integer of the kernel; it divides as the GPU does, towards zero."""

    def to(self, _dtype):
        """Widened, which Python's integers are already."""
        return self

    def __floordiv__(self, other):
        return Scalar(abs(self) // abs(other) * (1 if (self < 0) == (other < 0) else -1))

    def __mod__(self, other):
        return Scalar(self - (self // other) * other)


def _stay_scalar(name: str) -> Callable:
    plain = getattr(int, name)

    def operate(self, other):
        result = plain(self, other)
        return Scalar(result) if type(result) is int else result

    return operate


for _name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        setattr(Scalar, _operator, _stay_scalar(_operator))


def number(x: Any) -> Any:
    """An integer as a Scalar."""
    return Scalar(x) if type(x) is int else x


def like(x: Any, other: Any) -> Any:
    """A number as a tensor that `other` can be compared with."""
    if isinstance(x, torch.Tensor) or not isinstance(other, torch.Tensor):
        return x
    return torch.tensor(x, dtype=other.dtype)


@dataclass(eq=False)
class Pointer:
    """An address, or a block of them: elements of `memory`, a flat view of what the tensor's storage holds."""

    memory: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self):
        """With the pointer's element type, as in `ptr.dtype.element_ty`."""
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)


class Descriptor:
    """A host tensor descriptor: reads zeros and writes nothing outside of its tensor."""

    def __init__(self, host: TensorDescriptor) -> None:
        self.tensor = torch.as_strided(host.base, tuple(host.shape), tuple(host.strides), host.base.storage_offset())
        self.block_shape, self.dtype, self.layout, self.shape = (
            host.block_shape,
            host.base.dtype,
            host.layout,
            host.shape,
        )
        count = torch.Size(host.block_shape).numel()
        self.nbytes_per_cta = count * self.tensor.element_size()
        self.block_type = types.SimpleNamespace(nbytes=self.nbytes_per_cta, shape=host.block_shape)

    def _inside(self, coord) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        whole, part = [], []
        for start, size, limit in zip(map(int, coord), self.block_shape, self.tensor.shape, strict=True):
            low, high = max(start, 0), max(min(start + size, limit), max(start, 0))
            whole.append(slice(low, high))
            part.append(slice(low - start, high - start))
        return tuple(whole), tuple(part)

    def read(self, coord) -> torch.Tensor:
        """The block at `coord`."""
        values = torch.zeros(self.block_shape, dtype=self.dtype)
        whole, part = self._inside(coord)
        if all(x.start < x.stop for x in whole):
            values[part] = self.tensor[whole]
        return values

    def write(self, coord, values: torch.Tensor, add: bool = False) -> None:
        """Replace, or add to, the block at `coord`."""
        whole, part = self._inside(coord)
        if all(x.start < x.stop for x in whole):
            values = values.reshape(self.block_shape)[part]
            self.tensor[whole] = self.tensor[whole] + values if add else values


# ------------------------------------------------------------------------------------------------ kernels


class Emulator(Machine):
    """A machine that runs kernels.

    edits: {"forward.consumer": (old, new)} replaces text in the source of that kernel function, which must be there.
    """

    def __init__(self, seed: int = 0, edits: dict[str, tuple[str, str]] | None = None) -> None:
        super().__init__(seed)
        self.edits = edits or {}
        self.programs = (1,)
        self.language = Language(self)

    def launch(self, kernel: JITFunction, grid, arguments: tuple, options: dict[str, Any]) -> None:
        """kernel[grid](*arguments, **options) with the tensors' own memory."""
        names = kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | {n: x for n, x in options.items() if n in names}
        threads = 32 * options.get("num_warps", 4)
        grid = grid(given) if callable(grid) else grid
        grid = (*grid, 1, 1)[:3]
        body = self.translate(kernel)
        programs = range(grid[0] * grid[1] * grid[2])
        for index in self.random.sample(programs, len(programs)):  # one after the other, in any order
            self.program, self.programs = (
                (index % grid[0], index // grid[0] % grid[1], index // grid[0] // grid[1]),
                grid,
            )
            self.current = Partition(kernel.__name__, threads, {})
            self.bars.clear()
            body(**{name: self.argument(x) for name, x in given.items()})
            if self.flights:
                raise Hazard(f"{kernel.__name__} ends with {len(self.flights)} TMA loads in flight")

    @staticmethod
    def argument(x: Any) -> Any:
        """An argument as the kernel sees it."""
        if isinstance(x, torch.Tensor):
            end = x.untyped_storage().nbytes() // x.element_size()
            return Pointer(torch.as_strided(x, (end,), (1,), 0), x.storage_offset())
        if isinstance(x, TensorDescriptor):
            return Descriptor(x)
        return number(x)

    def translate(self, x: Any) -> Any:
        """What a name of the kernels' source stands for here."""
        if isinstance(x, JITFunction):
            return self._function(x.fn)
        if isinstance(x, ConstexprFunction):  # plain Python, for the compiler too
            return x.fn
        if isinstance(x, types.ModuleType):
            if x.__name__ in ("triton", "triton.experimental.gluon"):
                return _Decorators()
            known = self.language.modules.get(x.__name__)
            return _Module(self, x) if known is None else known
        if isinstance(x, gl.constexpr):
            return x.value
        if isinstance(x, gl.dtype):
            return DTYPES[x]
        if callable(x) and (x.__module__ or "").startswith("triton."):
            return getattr(self.language, x.__name__)
        if hasattr(x, "__triton_builtin__"):  # made by the kernels' own package
            return getattr(self.language, x.__name__)
        return x

    def _function(self, function: types.FunctionType) -> Callable:
        names = _Names(self, function.__globals__)
        where = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        if where not in self.edits:
            return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        old, new = self.edits[where]
        source = textwrap.dedent(inspect.getsource(function))
        if old not in source:
            raise LookupError(f"{where} has no {old!r} any more")
        source = "from __future__ import annotations\n" + source[source.index("def ") :].replace(old, new)
        defined: dict[str, Any] = {}
        code = compile(source, where, "exec")
        linecache.cache[where] = len(source), None, source.splitlines(keepends=True), where
        exec(code, dict(names), defined)  # the kernel's own text
        changed = defined[function.__name__]
        return types.FunctionType(changed.__code__, names, function.__name__, function.__defaults__)


class _Names(dict):
    """The globals of a kernel function, each translated when it is used."""

    def __init__(self, machine: Emulator, original: dict[str, Any]) -> None:
        super().__init__(range=machine.language.range)
        self.machine, self.original = machine, original

    def __missing__(self, name: str) -> Any:
        if name not in self.original:
            raise KeyError(name)
        return self.machine.translate(self.original[name])


class _Module:
    """A module of the kernels' package, each of its names translated when it is used."""

    def __init__(self, machine: Emulator, original: types.ModuleType) -> None:
        self._machine, self._original = machine, original

    def __getattr__(self, name: str) -> Any:
        return self._machine.translate(getattr(self._original, name))


class _Decorators:
    """gluon.jit and its kin, where a source with an edit is read again."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *a, **k: a[0] if a else (lambda function: function)


@dataclass(eq=False)
class _Compiled:
    """A kernel that Triton has compiled: launched with all its arguments by place."""

    machine: Emulator
    kernel: JITFunction

    def __getitem__(self, grid):
        return lambda *arguments: self.machine.launch(self.kernel, grid, arguments, {})


class Language:
    """The functions of gl, tl, mbarrier, tma and hopper that the kernels call."""

    def __init__(self, machine: Emulator) -> None:
        self.machine = machine
        m = machine
        hopper_functions = types.SimpleNamespace(
            fence_async_shared=self.fence_async_shared, warpgroup_mma=m.mma, warpgroup_mma_wait=m.mma_wait,
            warpgroup_mma_init=lambda x: x, tma=self, mbarrier=_MbarrierModule(m),
        )  # fmt: skip
        self.modules = {
            gl.__name__: self,
            tl.__name__: self,
            hopper.__name__: hopper_functions,
            hopper.tma.__name__: self,
            hopper.mbarrier.__name__: hopper_functions.mbarrier,
        }
        self.warpgroup_mma, self.warpgroup_mma_wait, self.warpgroup_mma_init = m.mma, m.mma_wait, lambda x: x
        self.async_copy_global_to_shared = self.async_load = m.load
        self.async_copy_shared_to_global = self.async_store = m.store
        self.store_wait = m.store_wait
        self.reinterpret = lambda tile, dtype, shape, layout: tile.reshape(shape)
        self.tma_reduce_add = self.async_atomic_add = lambda d, coord, source: m.store(d, coord, source, add=True)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *a, **k: "layout"
        found = getattr(gl, name, None)
        if isinstance(found, gl.dtype):
            return DTYPES[found]
        raise AttributeError(f"the emulator does not have {name} of Gluon")

    @staticmethod
    def range(*bounds, **_options) -> Iterator[Scalar]:
        """A loop of the kernel."""
        return map(Scalar, range(*map(int, bounds)))

    static_range = range

    @staticmethod
    def constexpr(x):
        """Python's values are known when they are needed."""
        return x

    @staticmethod
    def static_assert(condition, message=""):
        """Checked."""
        assert condition, message

    def program_id(self, axis):
        """Of the thread block that runs."""
        return Scalar(self.machine.program[axis])

    def num_programs(self, axis):
        """Of the launch."""
        return Scalar(self.machine.programs[axis])

    # -- blocks

    zeros = staticmethod(lambda shape, dtype, layout=None: block(torch.zeros(tuple(shape), dtype=dtype)))
    full = staticmethod(lambda shape, value, dtype, layout=None: block(torch.full(tuple(shape), value, dtype=dtype)))
    arange = staticmethod(lambda start, end, layout=None: block(torch.arange(start, end)))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    set_auto_layout = staticmethod(lambda x, layout: x)
    exp2, log2, exp, log, abs, sqrt, floor = map(
        staticmethod, (torch.exp2, torch.log2, torch.exp, torch.log, abs, torch.sqrt, torch.floor)
    )
    broadcast = staticmethod(lambda x, y: torch.broadcast_tensors(x, y))
    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    reshape = staticmethod(lambda x, shape: x.reshape(shape))
    permute = staticmethod(lambda x, order: x.permute(order))
    split = staticmethod(lambda x: x.split())
    join = staticmethod(lambda x, y: torch.stack([x, y], -1))
    cdiv = staticmethod(lambda x, y: (x + y - 1) // y)
    multiple_of = max_contiguous = staticmethod(lambda x, _n: x)
    assume = static_print = device_print = staticmethod(lambda *_: None)
    fma = staticmethod(lambda x, y, z: x * y + z)
    max = staticmethod(lambda x, axis: x.amax(axis))
    min = staticmethod(lambda x, axis: x.amin(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))

    @staticmethod
    def where(condition, x, y):
        """Choice, of numbers or element by element."""
        if not isinstance(condition, torch.Tensor):
            return number(x if condition else y)
        return block(torch.where(condition, like(x, y), like(y, x)))

    @staticmethod
    def maximum(x, y):
        """Of numbers or element by element."""
        if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
            return torch.maximum(like(x, y), like(y, x))
        return number(max(x, y))

    @staticmethod
    def minimum(x, y):
        """Of numbers or element by element."""
        if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
            return torch.minimum(like(x, y), like(y, x))
        return number(min(x, y))

    # -- memory

    def allocate_shared_memory(self, dtype, shape, layout=None, value=None):
        """Poisoned: what nobody loads is NaN. The bytes of an mbarrier are 64-bit integers."""
        caller = inspect.currentframe().f_back
        line = inspect.getframeinfo(caller).code_context
        name = (line[0] if line else "shared").partition("=")[0].strip()
        if dtype == torch.int64:
            return Mbarriers(name, shape[0])
        return Shared(self.machine, Allocation(name), torch.full(tuple(shape), torch.nan, dtype=dtype))

    @staticmethod
    def load(pointer, mask=None, other=0, **_options):
        """From global memory."""
        offset = pointer.offset
        if not isinstance(offset, torch.Tensor):
            value = (
                pointer.memory[int(offset)] if mask is None or mask else torch.tensor(other, dtype=pointer.memory.dtype)
            )
            return Scalar(value) if not value.is_floating_point() else block(value)
        keep = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.broadcast_to(mask, offset.shape)
        values = torch.full(offset.shape, other, dtype=pointer.memory.dtype)
        plain = keep.as_subclass(torch.Tensor)
        values[plain] = pointer.memory[offset.as_subclass(torch.Tensor)[plain]]
        return block(values)

    @staticmethod
    def store(pointer, values, mask=None, **_options):
        """To global memory."""
        _scatter(pointer, values, mask, lambda memory, at, x: memory.__setitem__(at, x.to(memory.dtype)))

    @staticmethod
    def atomic_add(pointer, values, mask=None, **_options):
        """To global memory; nobody uses what was there before."""
        _scatter(pointer, values, mask, lambda memory, at, x: memory.index_add_(0, at, x.to(memory.dtype)))

    # -- synchronisation

    def fence_async_shared(self, cluster=False):
        """fence.proxy.async."""
        self.machine.fence()

    def barrier(self, **_options):
        """Among the threads of one partition, which are one thread here."""
        self.machine.pause()

    thread_barrier = barrier

    def warp_specialize(self, partitions, worker_num_warps, worker_num_regs=None):
        """The first partition has the warps of the launch."""
        threads = [self.machine.current.threads, *(32 * n for n in worker_num_warps)]
        self.machine.specialize(partitions, threads)

    def inline_asm_elementwise(self, asm, constraints, args, dtype=None, is_pure=True, pack=1):
        """The kernels' assembly: a named barrier, an opaque zero, tanh, a rounding."""
        outputs = constraints.count("=")
        if bar := BAR.search(asm):
            operand = bar["id"]
            # `t` is the last operand plus bits that are zero (they only order the barrier behind the other ones)
            number = operand if operand.isdigit() else args[int(operand[1:]) - outputs if operand[0] == "$" else -1]
            self.machine.bar(bar["kind"], int(number), int(bar["threads"]))
            return Scalar(0)
        if asm.startswith("cp.async.bulk.wait_group 0"):
            self.machine.additions_done()
            return Scalar(0)
        if "tanh.approx" in asm:
            return torch.tanh(args[0])
        if asm.startswith("cvt.rni.s32.f32"):
            x = torch.nan_to_num(args[0].double(), nan=0.0).round()
            if x.abs().max() > 2**30:
                raise Hazard(f"a part of dQ is {x.abs().max().item() / 2**30:.3g} times what its row's bound allows")
            return x.to(torch.int32)
        # A warp's threads are one thread here; a comment does nothing.
        if asm.startswith(("bar.warp.sync", "//", "mov.b32 $0, 0")):
            return Scalar(0)
        if "vote.sync" in asm:  # a product that is left out where it changes nothing
            return args[0] * args[1]
        raise Hazard(f"the emulator does not know the assembly {asm!r}")


class _MbarrierModule:
    """gl.nvidia.hopper.mbarrier."""

    def __init__(self, machine: Emulator) -> None:
        self.machine = machine

    @staticmethod
    def MBarrierLayout():
        """Of no consequence here."""
        return "layout"

    @staticmethod
    def init(barrier, count):
        """A barrier of `count` arrivals a phase."""
        barrier.count = barrier.missing = int(count)

    @staticmethod
    def invalidate(barrier):
        """Its memory is free for other use."""
        barrier.count = 0

    def expect(self, barrier, nbytes, pred=True):
        """An arrival that announces bytes."""
        self.machine.pause()
        if pred:
            barrier.arrive(self.machine.current.clock, int(nbytes))
            self.machine.current.step()

    def arrive(self, barrier, *, count=1, pred=True):
        """An arrival."""
        self.machine.pause()
        if pred:
            barrier.arrive(self.machine.current.clock, count=count)
            self.machine.current.step()

    def wait(self, barrier, phase, pred=True, deps=()):
        """Until the phase of that parity is over."""
        if pred:
            parity = int(phase)
            self.machine.pause(lambda: barrier.phases & 1 != parity, f"parity {parity} of {barrier}")
            learn(self.machine.current.clock, barrier.passed)


def _scatter(pointer: Pointer, values: Any, mask: Any, write: Callable) -> None:
    offset = torch.as_tensor(pointer.offset).as_subclass(torch.Tensor)
    values = torch.broadcast_to(torch.as_tensor(values).as_subclass(torch.Tensor), offset.shape)
    keep = torch.ones_like(offset, dtype=torch.bool)
    if mask is not None:
        keep = torch.broadcast_to(torch.as_tensor(mask).as_subclass(torch.Tensor), offset.shape)
    write(pointer.memory, offset[keep], values[keep])


@contextlib.contextmanager
def emulated(seed: int = 0, edits: dict[str, tuple[str, str]] | None = None) -> Iterator[Emulator]:
    """Within it every launch of a Gluon or Triton kernel runs on the CPU, on an Emulator of that seed and with those edits."""
    machine = Emulator(seed, edits)

    def run(kernel, *arguments, grid, warmup, **options):
        assert not warmup
        machine.launch(kernel, grid, arguments, options)
        return _Compiled(machine, kernel)  # what a launch through Triton's dispatch returns

    with mock.patch.object(JITFunction, "run", run):
        yield machine
