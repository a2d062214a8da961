"""Timers with a cold cache, and the interleaved measurement of several calls.

A sample is one call. On CUDA it is bracketed by two device events, after the L2 cache was
overwritten; before that the device sleeps for as long as the call's Python takes, so that all of
its launches are queued before the first event passes, as they are in a model whose queue is full.
On the CPU it is the monotonic clock around the call, caches as the call left them.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

# Bound here, before any backend is imported, so that none can replace what measures it.
_clock = time.perf_counter
_sleep = time.sleep
_device_sleep = torch.cuda._sleep
_Event = torch.cuda.Event
_elapsed = torch.cuda.Event.elapsed_time

FLUSH_TIMES_L2 = 5  # 256 MB on an H200 (50 MB of L2), what triton.testing.do_bench overwrites too
LEAD_MS = 1.0  # the host's start over the device, before each sample, at the most; a burst's first call has all of it
CYCLES_A_MS = 2_000_000  # of the device's sleep: about 2 GHz
BURST_MS = 4.0  # samples of one call in a row, before the next call has its turn
ROUNDS = (7, 60)  # least for an interval, most that is ever useful
PATIENCE = 3  # caps; a call so slow that 7 rounds take longer is left at fewer, but not below 3
SPREAD = 0.005  # stop once the median of every call is known this well
REST = 1.0  # idle time after a burst, in bursts: under the power cap clocks follow the load before


@dataclass(slots=True)
class Samples:
    """Raw milliseconds of one call, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    def medians(self) -> list[float]:
        """One figure a round."""
        return [statistics.median(burst) for burst in self.rounds]

    def all(self) -> list[float]:
        """Every sample."""
        return [sample for burst in self.rounds for sample in burst]


class CudaTimer:
    """Device events around each call, cold L2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = FLUSH_TIMES_L2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)

    def burst(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of `count` calls, each on a cold cache."""
        events = [(_Event(enable_timing=True), _Event(enable_timing=True)) for _ in range(count)]
        lead = LEAD_MS
        for start, stop in events:
            _device_sleep(int(lead * CYCLES_A_MS))
            self._flush.zero_()
            start.record()
            begin = _clock()
            call()
            lead = min(1.5e3 * (_clock() - begin), LEAD_MS)  # half as much again as this call took the host
            stop.record()
        torch.cuda.synchronize(self.device)
        return [_elapsed(start, stop) for start, stop in events]

    def wall(self, call: Callable[[], object]) -> float:
        """Milliseconds on the host clock from an idle device to an idle device: sees every stream."""
        torch.cuda.synchronize(self.device)
        begin = _clock()
        call()
        torch.cuda.synchronize(self.device)
        return (_clock() - begin) * 1e3

    def host(self, call: Callable[[], object], count: int) -> float:
        """Microseconds of host time a call costs before it returns to Python: the mean of `count` in a row."""
        torch.cuda.synchronize(self.device)
        begin = _clock()
        for _ in range(count):
            call()
        end = _clock()
        torch.cuda.synchronize(self.device)
        return (end - begin) * 1e6 / count


class CpuTimer:
    """The monotonic clock around each call."""

    def burst(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of `count` calls."""
        return [self.wall(call) for _ in range(count)]

    def wall(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        begin = _clock()
        call()
        return (_clock() - begin) * 1e3

    def host(self, call: Callable[[], object], count: int) -> float:
        """Microseconds of a call; on the CPU the launch is the work."""
        return statistics.median(self.burst(call, count)) * 1e3


def timer_for(device: torch.device) -> CudaTimer | CpuTimer:
    """The timer of a device type."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def time_interleaved(
    calls: dict[str, Callable[[], object]],
    timer: CudaTimer | CpuTimer,
    *,
    seconds: float,
    before_burst: Callable[[str, int], None] = lambda name, number: None,
    after_burst: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Time `calls` in turn, A B C A B C, until every median is known to 0.5 % or the time is up.

    seconds: the cap, spread over all calls; the least number of rounds is measured up to PATIENCE times that.
    before_burst(name, round) runs untimed before each burst (fresh inputs, poisoned memory),
    after_burst(name) right after it, before anything else may run (to catch late outputs).
    """
    bursts = {}
    for name, call in calls.items():  # warm-up, and the size of a burst
        before_burst(name, 0)
        bursts[name] = max(1, min(50, round(BURST_MS / max(min(timer.burst(call, 3)), 1e-3))))
    samples = {name: Samples() for name in calls}
    with _no_gc():
        end = _clock() + seconds
        for number in range(1, ROUNDS[1] + 1):
            for name, call in calls.items():
                before_burst(name, number)
                begin = _clock()
                samples[name].rounds.append(timer.burst(call, bursts[name]))
                after_burst(name)
                if isinstance(timer, CudaTimer):
                    _sleep(min(REST * (_clock() - begin), 0.1))
            now = _clock()
            if number >= ROUNDS[0] and (now > end or all(settled(s) for s in samples.values())):
                break
            if number >= 3 and now > end + (PATIENCE - 1) * seconds:
                break
    return samples


def settled(samples: Samples) -> bool:
    """Is the standard error of the median of the rounds below SPREAD?"""
    medians = samples.medians()
    middle = statistics.median(medians)
    deviation = 1.4826 * statistics.median(abs(m - middle) for m in medians)  # robust sigma
    return 1.2533 * deviation / len(medians) ** 0.5 <= SPREAD * middle


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def graph_replay_ms(call: Callable[[], object], timer: CudaTimer, samples: int = 9) -> float | None:
    """Median milliseconds of a CUDA-graph replay of `call`, or None where it cannot be captured."""
    side = torch.cuda.Stream(timer.device)
    side.wait_stream(torch.cuda.current_stream(timer.device))
    try:
        with torch.cuda.stream(side):
            call()  # allocations and lazy initialisation may not happen during capture
        torch.cuda.current_stream(timer.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # the reason is the library's; "not capturable" is the answer
        torch.cuda.synchronize(timer.device)
        return None
    return statistics.median(timer.burst(graph.replay, samples))
