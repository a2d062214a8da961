"""One thread block on a CPU: partitions, shared memory, barriers, wgmma and TMA, and what they do to one another.

Exactly one partition runs at a time; at every operation that another one could notice, a seeded random choice says
who goes on, so that a schedule is the same in every run. TMA loads land when the schedule says so. Reported, with who
and where: partitions that wait for each other for ever (who waits for what); two partitions, or a partition and a copy,
that touch one piece of shared memory with no barrier between them (each carries a vector clock that barriers pass on,
so the pair is found in whatever order it ran); a buffer written while a wgmma or a TMA store still reads it; a plain
store that the tensor cores or TMA read without a fence; an arrival too many; a copy in flight when the kernel ends.
What was never loaded is NaN.

Not modelled: registers, layouts and swizzles, what the threads of one partition do among themselves, speed.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Clock = dict[Any, int]  # who -> the last of its steps that is known to have happened


class Hazard(Exception):
    """What the pipeline does wrong, in words."""


class _Stopped(BaseException):
    """Another partition failed; this one ends too."""


class Block(torch.Tensor):
    """A block of values in registers; a number of the kernel's is one with no dimensions, or a Scalar."""

    @property
    def type(self):
        """Asked for its layout, or the dtype of its elements."""
        return types.SimpleNamespace(layout="layout", element_ty=self.dtype, scalar=self.dtype)

    def to(self, dtype, bitcast=False):
        """Converted, or the same bits."""
        return self.view(dtype) if bitcast else super().to(dtype)

    def split(self):
        """The two halves of a last dimension of 2."""
        return self[..., 0], self[..., 1]


def block(x: torch.Tensor) -> Block:
    """`x` as a Block."""
    return x.as_subclass(Block)


# ------------------------------------------------------------------------------------------------ shared memory


@dataclass(eq=False)
class Access:
    """Who touched which bytes of an allocation, at which of its steps."""

    who: Any
    step: int
    low: int
    high: int
    writes: bool
    plain: bool  # through the generic proxy: TMA and wgmma see it behind a fence only

    def meets(self, low: int, high: int) -> bool:
        """Do the bytes overlap?"""
        return self.low < high and low < self.high


@dataclass(eq=False)
class Allocation:
    """One allocation of shared memory and what was done to it."""

    name: str
    log: list[Access] = field(default_factory=list)
    readers: list[tuple[int, int, str]] = field(default_factory=list)  # bytes that an unfinished wgmma or store reads


class Shared:
    """A view of shared memory. Strided views count as all bytes from their first to their last."""

    layout = "layout"

    def __init__(self, machine: Machine, home: Allocation, values: torch.Tensor) -> None:
        self.machine, self.home, self.values = machine, home, values
        size = values.element_size()
        self.low = values.storage_offset() * size
        self.high = self.low + size * (
            1 + sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True))
        )

    def _view(self, values: torch.Tensor) -> Shared:
        return Shared(self.machine, self.home, values)

    @property
    def shape(self):
        """As in Gluon."""
        return list(self.values.shape)

    @property
    def dtype(self):
        """As in Gluon."""
        return self.values.dtype

    def index(self, i):
        """One element of the first dimension."""
        if not 0 <= int(i) < self.values.shape[0]:
            raise Hazard(f"{self.home.name} has {self.values.shape[0]} slots, asked for number {int(i)}")
        return self._view(self.values[int(i)])

    def slice(self, start, length, dim=0):
        """Part of one dimension."""
        return self._view(self.values.narrow(dim, int(start), int(length)))

    def permute(self, order):
        """Dimensions in another order."""
        return self._view(self.values.permute(tuple(order)))

    def reshape(self, shape):
        """The same bytes in another shape."""
        return self._view(self.values.view(tuple(shape)))

    def load(self, layout=None):
        """Into registers."""
        self.machine.pause()
        self.machine.access(self, writes=False)
        return block(self.values.clone())

    def store(self, values):
        """Out of registers."""
        self.machine.pause()
        if tuple(values.shape) != tuple(self.values.shape):
            raise Hazard(f"a block of {tuple(values.shape)} stored into {self.home.name} of {tuple(self.values.shape)}")
        self.machine.access(self, writes=True, plain=True)
        self.values.copy_(values)

    def __str__(self):
        size = self.values.element_size() * self.values.numel()
        return f"{self.home.name}[bytes {self.low} to {max(self.high, self.low + size)}]"


# ------------------------------------------------------------------------------------------------ barriers


@dataclass(eq=False)
class Mbarrier:
    """An mbarrier: a phase ends when all its arrivals and all the bytes it expects are there."""

    name: str
    count: int = 0
    missing: int = 0
    bytes: int = 0
    phases: int = 0
    loads: int = 0
    gathering: Clock = field(default_factory=dict)
    passed: Clock = field(default_factory=dict)

    def settle(self) -> None:
        """End the phase if nothing is missing."""
        if self.count and self.missing == 0 and self.bytes == 0:
            self.phases += 1
            self.missing = self.count
            learn(self.passed, self.gathering)

    def arrive(self, clock: Clock, bytes_expected: int = 0, count: int = 1) -> None:
        """One arrival, which may announce bytes."""
        if self.count == 0:
            raise Hazard(f"{self.name} was not initialised")
        if self.missing < count:
            raise Hazard(f"{self.name}: an arrival too many in phase {self.phases}, it counts {self.count}")
        self.missing -= count
        self.bytes += bytes_expected
        learn(self.gathering, clock)
        self.settle()

    def __str__(self):
        return f"{self.name} (phase {self.phases}: {self.missing} arrivals and {self.bytes} bytes missing)"


class Mbarriers:
    """An allocation of mbarriers."""

    def __init__(self, name: str, count: int) -> None:
        self.each = [Mbarrier(f"{name}[{i}]") for i in range(count)]

    def index(self, i):
        """One of them."""
        if not 0 <= int(i) < len(self.each):
            raise Hazard(f"{self.each[0].name[:-3]} has {len(self.each)} barriers, asked for number {int(i)}")
        return self.each[int(i)]


@dataclass(eq=False)
class Named:
    """A hardware barrier of the block (bar.sync, bar.arrive)."""

    id: int
    threads: int = 0
    present: list[Partition] = field(default_factory=list)
    phases: int = 0
    gathering: Clock = field(default_factory=dict)
    passed: Clock = field(default_factory=dict)

    def enter(self, partition: Partition, threads: int) -> None:
        """`partition` arrives at the open phase."""
        if self.present and threads != self.threads:
            raise Hazard(
                f"bar {self.id} is used by {partition.name} with {threads} threads, by others with {self.threads}"
            )
        if partition in self.present:
            raise Hazard(f"bar {self.id}: {partition.name} arrives twice in phase {self.phases}")
        self.threads = threads
        self.present.append(partition)
        learn(self.gathering, partition.clock)
        here = sum(p.threads for p in self.present)
        if here > threads:
            raise Hazard(f"bar {self.id}: {here} threads arrive where {threads} are meant")
        if here == threads:
            self.present = []
            self.phases += 1
            learn(self.passed, self.gathering)

    def __str__(self):
        return f"bar {self.id} (phase {self.phases}: only {', '.join(p.name for p in self.present) or 'nobody'} there)"


def learn(clock: Clock, other: Clock) -> None:
    """Let `clock` know all that `other` knows."""
    for who, step in other.items():
        if clock.get(who, 0) < step:
            clock[who] = step


# ------------------------------------------------------------------------------------------------ who runs


class Token:
    """The result of an asynchronous wgmma, no value before warpgroup_mma_wait."""

    def __init__(self, value: torch.Tensor, operands: list[Shared], who: str) -> None:
        self.value, self.done = value, False
        self.reads = [(x.home, (x.low, x.high, f"a wgmma of {who}")) for x in operands]
        self.operands = operands

    def __getattr__(self, name: str) -> Any:
        raise Hazard("the result of a wgmma is used before warpgroup_mma_wait")

    def _unfinished(self, *_: Any) -> Any:
        raise Hazard("the result of a wgmma is used before warpgroup_mma_wait")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __neg__ = __getitem__ = _unfinished


class Partition:
    """One warp group's program."""

    def __init__(self, name: str, threads: int, clock: Clock) -> None:
        self.name, self.threads = name, threads
        self.clock: Clock = {**clock, self: 1}
        self.wake = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None
        self.waits_for: Any = None
        self.wgmmas: list[Token] = []
        self.stores: list[tuple[Allocation, tuple[int, int, str]]] = []
        self.unfenced: list[Access] = []

    def step(self) -> None:
        """What happens from here on is not known to those who synchronised before."""
        self.clock[self] += 1


class Machine:
    """One thread block at a time, its partitions interleaved by `seed`."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.error: BaseException | None = None
        self.live: list[Partition] = []
        self.flights: list[Callable[[], None]] = []  # TMA loads that have not landed
        self.additions: list[tuple[Partition, Callable[[], None]]] = []  # TMA's, whose and what, not carried out yet
        self.bars: dict[int, Named] = {}
        self.program = (0,)

    # -- schedule

    def pause(self, ready: Callable[[], bool] | None = None, waits_for: Any = None) -> None:
        """Let somebody else go on, until `ready` and chosen again."""
        me = self.current
        if not self.live:  # outside of warp_specialize there is nobody else
            while ready is not None and not ready():
                if not self.flights:
                    raise Hazard(f"deadlock: {me.name} waits for {waits_for}")
                self.flights.pop(self.random.randrange(len(self.flights)))()
            return
        me.ready, me.waits_for = ready, waits_for
        following = self._choose()
        if following is not me:
            following.wake.release()
            me.wake.acquire()
            if self.error:
                raise _Stopped
        self.current = me

    def _choose(self) -> Partition:
        while True:
            able = [p for p in self.live if p.ready is None or p.ready()]
            if not able and not self.flights:
                who = "; ".join(f"{p.name} waits for {p.waits_for}" for p in self.live)
                raise Hazard(f"deadlock: {who}")
            if self.additions and self.random.random() < self.promptness:
                self.additions.pop(self.random.randrange(len(self.additions)))[1]()
            weights = [self.haste[p] for p in able] + [self.haste[None]] * bool(self.flights)
            chosen = self.random.choices([*able, None][: len(weights)], weights)[0]
            if chosen is not None:
                return chosen
            self.flights.pop(self.random.randrange(len(self.flights)))()

    def specialize(self, work: list[tuple[Callable, tuple]], threads: list[int]) -> None:
        """Run the partitions to their ends."""
        main = self.current
        main.step()
        names = [function.__name__ for function, _ in work]
        names = [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        self.live = [Partition(n, t, main.clock) for n, t in zip(names, threads, strict=True)]
        # Now and then a partition, or the memory, is much slower than the rest.
        self.haste = {p: self.random.choice((1, 1, 5, 30)) for p in [*self.live, None]}
        self.promptness = self.random.choice((1.0, 0.002))  # of TMA's additions: how likely one is, at a choice
        everyone = list(self.live)
        bodies = [
            threading.Thread(target=self._body, args=(p, main, *w), daemon=True)
            for p, w in zip(everyone, work, strict=True)
        ]
        for thread in bodies:
            thread.start()
        self._choose().wake.release()
        main.wake.acquire()
        for thread in bodies:
            thread.join()
        self.current = main
        if self.error:
            raise self.error
        for partition in everyone:
            learn(main.clock, partition.clock)

    def _body(self, me: Partition, main: Partition, function: Callable, arguments: tuple) -> None:
        me.wake.acquire()
        self.current = me
        try:
            if not self.error:
                function(*arguments)
                self.additions_done()
                if me.wgmmas or me.stores:
                    raise Hazard(f"{me.name} ends with a {'wgmma' if me.wgmmas else 'TMA store'} in flight")
        except _Stopped:
            pass
        except Exception as error:
            self.fail(error, me)
        self.live.remove(me)
        following = main
        if self.live:
            try:
                following = self.live[0] if self.error else self._choose()
            except Hazard as error:
                self.fail(error, me)
                following = self.live[0]
        following.wake.release()

    def fail(self, error: Exception, who: Partition) -> None:
        """Keep the first error, with the partition it happened in."""
        if self.error is None:
            error.add_note(f"in {who.name} of program {self.program}")
            self.error = error

    # -- memory

    def access(self, view: Shared, *, writes: bool, plain: bool = False, asynchronous: bool = False,
               who: Any = None, step: int = 0, record: bool = True) -> None:  # fmt: skip
        """Check one access of the running partition against all others that no barrier put before it, and record it."""
        me, home = self.current, view.home
        name = "a TMA load" if who is not None else me.name
        verb = "writes" if writes else "reads"
        if writes:
            for low, high, reader in home.readers:
                if low < view.high and view.low < high:
                    raise Hazard(f"{name} writes {view} while {reader} reads it")
        for other in home.log:
            if not other.meets(view.low, view.high) or not (writes or other.writes):
                continue
            if other.who is not me and other.step > me.clock.get(other.who, 0):
                did = "written" if other.writes else "read"
                by = other.who.name if isinstance(other.who, Partition) else f"the TMA load of {other.who.name}"
                raise Hazard(f"race: {name} {verb} {view}, {did} by {by} with no barrier between")
            if asynchronous and other.writes and other.plain:
                raise Hazard(f"no fence: {name} {verb} {view} through TMA or wgmma, a plain store wrote it")
        if not record:
            return
        mine = Access(who or me, step or me.clock[me], view.low, view.high, writes, plain)
        home.log = [
            x
            for x in home.log
            if not (mine.low <= x.low and x.high <= mine.high and (writes or (x.who is mine.who and not x.writes)))
        ]
        home.log.append(mine)
        if plain:
            me.unfenced.append(mine)

    def fence(self) -> None:
        """Plain stores of the running partition become visible to TMA and wgmma."""
        for access in self.current.unfenced:
            access.plain = False
        self.current.unfenced.clear()

    def bar(self, kind: str, number: int, threads: int) -> None:
        """bar.sync or bar.arrive."""
        if not 0 <= number < 16:
            raise Hazard(f"bar {number}: there are 16")
        self.pause()
        me, bar = self.current, self.bars.setdefault(number, Named(number))
        phase = bar.phases
        bar.enter(me, threads)
        me.step()
        if kind == "sync":
            self.pause(lambda: bar.phases > phase, bar)
            learn(me.clock, bar.passed)

    def mma(self, a, b, acc, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
        """warpgroup_mma."""
        self.pause()
        me, operands = self.current, [x for x in (a, b) if isinstance(x, Shared)]
        for x in operands:
            self.access(x, writes=False, asynchronous=True, record=False)
        a, b = ((x.values if isinstance(x, Shared) else x).float() for x in (a, b))
        value = torch.matmul(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor))
        if use_acc:
            value = value + (acc.value if isinstance(acc, Token) else acc).as_subclass(torch.Tensor)
        token = Token(block(value), operands, me.name)
        for home, reader in token.reads:
            home.readers.append(reader)
        me.wgmmas.append(token)
        return token if is_async else self.mma_wait(0, [token])

    def mma_wait(self, num_outstanding=0, deps=()):
        """warpgroup_mma_wait: the values of what is finished now, in the order of `deps`."""
        self.pause()
        me = self.current
        while len(me.wgmmas) > int(num_outstanding):
            token = me.wgmmas.pop(0)
            token.done = True
            for view, (home, reader) in zip(token.operands, token.reads, strict=True):
                home.readers.remove(reader)
                self.access(view, writes=False)
        values = tuple(x.value if isinstance(x, Token) and x.done else x for x in deps)
        return values[0] if len(values) == 1 else values

    def load(self, descriptor, coord, barrier, target, pred=True, multicast=False):
        """TMA, global to shared memory: lands when the schedule says so."""
        self.pause()
        if not pred:
            return
        if target.values.numel() != torch.Size(descriptor.block_shape).numel():
            raise Hazard(f"a block of {descriptor.block_shape} loaded into {target.shape}")
        barrier.loads += 1
        number = barrier.loads
        self.access(target, writes=True, asynchronous=True, who=barrier, step=number)
        known = dict(self.current.clock)
        target.values.fill_(torch.nan)
        values = descriptor.read(coord).reshape(target.values.shape)

        def land() -> None:
            target.values.copy_(values)
            barrier.bytes -= descriptor.nbytes_per_cta
            learn(barrier.gathering, known | {barrier: number})
            barrier.settle()

        self.flights.append(land)

    def store(self, descriptor, coord, source, add=False):
        """TMA, shared to global memory; reads its source until store_wait."""
        self.pause()
        self.access(source, writes=False, asynchronous=True, record=False)
        if add:
            values, target = source.values.clone(), tuple(coord)
            self.additions.append((self.current, lambda: descriptor.write(target, values, True)))
        else:
            descriptor.write(coord, source.values)
        reader = source.low, source.high, f"a TMA store of {self.current.name}"
        source.home.readers.append(reader)
        self.current.stores.append((source, reader))

    def additions_done(self) -> None:
        """All additions of the running partition have been carried out."""
        self.pause()
        mine = [addition for addition in self.additions if addition[0] is self.current]
        self.additions = [addition for addition in self.additions if addition[0] is not self.current]
        for _, land in self.random.sample(mine, len(mine)):
            land()

    def store_wait(self, pendings=0):
        """All but the last `pendings` stores of the running partition have read their sources."""
        self.pause()
        while len(self.current.stores) > int(pendings):
            source, reader = self.current.stores.pop(0)
            source.home.readers.remove(reader)
            self.access(source, writes=False)
