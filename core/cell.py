"""The worker's side of a sweep: judge each backend on a problem, then time them in turn, and judge what was timed.

Requests and events are JSON objects. It returns raw samples and verdicts only; figures are made of
them on the other side of the pipe (core.sweep).
"""

from __future__ import annotations

import functools
import importlib
import re
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from flash2.core import functional, timing
from flash2.core.contract import Backend, nearest_supported, spec_of
from flash2.core.environment import PeakMemory, device_state, diagnosis, environment, free_bytes
from flash2.core.inputs import Inputs, make_inputs
from flash2.core.judge import Judge
from flash2.core.problem import Problem

Emit = Callable[[dict[str, Any]], None]

PROBE_INPUTS = ("needle", "half")  # judged before timing; what is timed, and judged again, is randn
# What a profile holds beside kernels: the runtime's calls, the profiler's own marks, autograd's nodes, ours among them.
BOOKKEEPING = re.compile(r"cuda[A-Z]|cu[A-Z]|\[|Activity|autograd::engine|_Attention(Backward)?$")
# Kernels that do an attention's work. One that ran and is not the backend's own is a fallback.
HEAVY = re.compile(r"gemm|gemv|matmul|::(b|add|baddb)?mm$|attention|flash|fmha|cutlass|cudnn", re.IGNORECASE)
DEAD = 70  # exit code of a worker that can no longer be trusted
HOST_MS = 20  # work to queue up while the launch cost is measured
LATE_MS = 0.5  # how much longer than its timed stream a call may take on the wall clock, beside 50 %


def handle(emit: Emit, request: dict[str, Any]) -> None:
    """Answer one request: `hello`, `why_not`, `doctor` or `group`."""
    {"hello": _hello, "why_not": _why_not, "doctor": _doctor, "group": _group}[request.pop("op")](emit, **request)


def _hello(emit: Emit, resolve: str, device: str, backends: list[str], seed: int) -> None:
    where = pick_device(device)
    emit({"event": "environment", "device": str(where), "environment": environment(where, seed)})
    for name in backends:
        emit({"event": "backend", "name": name, **describe(resolve, name, where)})


def describe(resolve: str, name: str, device: torch.device) -> dict[str, Any]:
    """Why a backend is unavailable (None if it is not), its version and classes by dtype on `device`."""
    try:
        backend = _backend(resolve, name)
    except (ImportError, ValueError) as error:
        return {"unavailable": str(error), "version": "", "classes": {}}
    classes = {dtype: list(backend.classes(dtype, device)) for dtype in backend.capability.precisions}
    return {"unavailable": backend.unavailable(), "version": backend.version(), "classes": classes}


def _why_not(emit: Emit, resolve: str, device: str, backends: list[str], problem: dict[str, Any]) -> None:
    asked, where = Problem.from_dict(problem), pick_device(device)
    for name in backends:
        answer: dict[str, Any] = {"event": "why_not", "name": name, "reasons": [], "nearest": None, "details": []}
        try:
            backend = _backend(resolve, name)
            answer["unavailable"] = backend.unavailable()
            answer["reasons"] = backend.why_not(asked, where)
            if answer["reasons"] and (nearest := nearest_supported(backend, asked, where)):
                answer["nearest"] = nearest.to_dict()
            if not answer["reasons"] and not answer["unavailable"]:
                answer["details"] = backend.details(asked, where)
        except ImportError as error:
            answer["unavailable"] = str(error)
        emit(answer)


def _doctor(emit: Emit, device: str) -> None:
    for check, found, remedy in diagnosis():
        emit({"event": "check", "check": check, "found": found, "remedy": remedy})


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _resolver(dotted: str) -> Callable[[str], Backend]:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def _backend(resolve: str, name: str) -> Backend:
    return _resolver(resolve)(name)


# --- one group: the same problem for several (backend, precision) --------------------------------


def _group(
    emit: Emit,
    resolve: str,
    device: str,
    problem: dict[str, Any],
    cells: list[tuple[str, str]],
    seconds: float,
    seed: int,
    graph: bool,
) -> None:
    where, base = pick_device(device), Problem.from_dict(problem)
    bench = Group(base, where, seed)
    survivors: dict[str, Operation] = {}
    for number, (name, precision) in enumerate(cells):
        emit({"event": "stage", "cell": number, "stage": "judge"})
        answer = _guarded(lambda name=name, p=precision: bench.admit(_backend(resolve, name), p))
        operation = answer.pop("operation", None)
        emit({"event": "judged", "cell": number, **answer})
        if operation is not None:
            survivors[str(number)] = operation
        _stop_if_dead(where)
    if survivors:
        try:
            bench.time(emit, survivors, seconds, graph)
        except Exception as error:  # of one backend; the others are timed again in a new process
            emit({"event": "judged", "cell": bench.running, "status": "error", "reason": _describe(error)})
            raise SystemExit(DEAD) from error


class Operation:
    """What one sample runs: forward, backward or both, of one backend on tensors that stay where they are."""

    def __init__(self, backend: Backend, problem: Problem, inputs: Inputs) -> None:
        self.backend, self.problem, self.inputs = backend, problem, inputs
        self.spec = spec_of(problem, inputs.alibi_slopes)
        self.qkv = [x.detach().requires_grad_(problem.pass_ != "fwd") for x in (inputs.q, inputs.k, inputs.v)]
        self.outputs: dict[str, torch.Tensor] = {}

    def prepare(self) -> None:
        """Untimed: a backward needs a forward of the same inputs before it."""
        self.release()
        if self.problem.pass_ == "bwd":
            self._forward()

    def __call__(self) -> None:
        """One timed sample."""
        if self.problem.pass_ != "bwd":
            self._forward()
        if self.problem.pass_ != "fwd":
            grads = torch.autograd.grad(self.outputs["o"], self.qkv, self.inputs.do, retain_graph=True)
            self.outputs.update(zip(("dq", "dk", "dv"), grads, strict=True))

    def _forward(self) -> None:
        q, k, v = self.qkv
        o, lse = functional.run(self.backend, q, k, v, self.spec, needs_grad=self.problem.pass_ != "fwd")
        self.outputs = {"o": o} if lse is None else {"o": o, "lse": lse}

    def release(self) -> None:
        """Let go of outputs and of the graph behind them, before another backend needs the memory."""
        self.outputs = {}

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The outputs as they are on the current stream now: whatever is still under way elsewhere is not in."""
        return {name: x.detach().clone() if type(x) is torch.Tensor else x for name, x in self.outputs.items()}


class Group:
    """One problem on one device: inputs and references made once, backends admitted and timed on them."""

    def __init__(self, problem: Problem, device: torch.device, seed: int) -> None:
        self.problem, self.device, self.seed = problem, device, seed
        self.running = 0  # the cell whose turn it is, for whoever has to say which one failed
        self._probes: dict[str, tuple[Inputs, Judge]] = {}
        if device.type == "cuda":
            # Which fp32 maths torch's own matmuls do is part of the problem here.
            torch.backends.cuda.matmul.allow_tf32 = False

    def probe(self, distribution: str) -> tuple[Inputs, Judge]:
        """Inputs of one distribution and their judge."""
        if distribution not in self._probes:
            inputs = make_inputs(self.problem, distribution=distribution, seed=self.seed, device=self.device)
            self._probes[distribution] = inputs, Judge(self.problem, inputs)
        return self._probes[distribution]

    def admit(self, backend: Backend, precision: str) -> dict[str, Any]:
        """Judge `backend` before it is timed: {status, reason, error, ...} and its Operation if all is well."""
        problem = self.problem.replace(precision=precision)
        if (reason := backend.unavailable()) is not None:
            return {"status": "unavailable", "reason": reason}
        with fp32_maths(precision):
            if reasons := backend.why_not(problem, self.device):
                return {"status": "unsupported", "reason": "; ".join(reasons)}
            need, free = backend.scratch_bytes(problem) + problem.bytes, free_bytes(self.device)
            if free is not None and need > free:
                return {
                    "status": "oom",
                    "reason": f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
                }
            operation = Operation(backend, problem, self.probe(PROBE_INPUTS[0])[0])
            build_ms, peak_bytes = self._first_calls(operation)
            error: dict[str, float | None] = {}
            for distribution in PROBE_INPUTS:
                inputs, judge = self.probe(distribution)
                verdict = judge.check(self._honest_call(Operation(backend, problem, inputs)), precision)
                error = verdict.error
                if not verdict.ok:
                    return {"status": "wrong", "reason": f"{distribution} inputs: {verdict.reason}", "error": error}
            kernels = kernel_names(operation, self.device)
            if reason := fallback(backend, kernels, self.device):
                return {"status": "wrong", "reason": reason, "error": error, "kernels": kernels}
        timed = Operation(backend, problem, self.timed_inputs)
        return {
            "status": "judged", "reason": "", "error": error, "kernels": kernels, "build_ms": build_ms,
            "peak_bytes": peak_bytes, "operation": timed,
        }  # fmt: skip

    @functools.cached_property
    def timed_inputs(self) -> Inputs:
        """The tensors every timed call reads; their contents change each round, their addresses do not."""
        return make_inputs(self.problem, distribution="randn", seed=self.seed, device=self.device)

    def _first_calls(self, operation: Operation) -> tuple[float, int | None]:
        # Milliseconds of the very first call, with all it compiles, and the bytes that a later one takes.
        before = {name: x.clone() for name, x in named(operation.inputs).items()}
        operation.prepare()
        begin = time.perf_counter()
        operation()
        self._synchronize()
        build_ms = (time.perf_counter() - begin) * 1e3
        operation.prepare()
        memory = PeakMemory(self.device)
        operation()
        self._synchronize()
        peak_bytes = memory.bytes()
        operation.release()
        for name, x in named(operation.inputs).items():
            x.copy_(before[name])  # who writes into its inputs is convicted by _honest_call, on inputs not yet spoilt
        return build_ms, peak_bytes

    def _honest_call(self, operation: Operation) -> dict[str, torch.Tensor]:
        # Inputs may not be written, outputs may not be what memory held before, nor arrive late.
        inputs = named(operation.inputs)
        before = {name: x.clone() for name, x in inputs.items()}
        operation.prepare()
        self._poison(operation)
        operation()
        outputs = operation.snapshot()
        self._synchronize()
        for name, x in inputs.items():
            if not torch.equal(x, before[name]):
                raise CaughtCheating(f"the call wrote into its input {name}")
            for out, y in operation.outputs.items():
                if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    raise CaughtCheating(f"its output {out} is memory of its input {name}")
        operation.release()
        return outputs

    def _poison(self, operation: Operation) -> None:
        # The allocator hands freed blocks out again: an output that is not written shows NaN.
        inputs = operation.inputs
        shapes = [inputs.q, inputs.q, inputs.k, inputs.v, inputs.q[..., 0].float()]
        blocks = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in shapes]
        del blocks

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, emit: Emit, operations: dict[str, Operation], seconds: float, graph: bool) -> None:
        """Time in turn on fresh contents each round, then judge what the last timed call of each returned."""
        timer, inputs = timing.timer_for(self.device), self.timed_inputs
        late: dict[str, dict[str, torch.Tensor]] = {}
        drawn = 0

        def before_burst(name: str, number: int) -> None:
            nonlocal drawn
            operation = operations[name]
            self.running = int(name)
            emit({"event": "stage", "cell": self.running, "stage": "time"})
            if number > drawn:  # the same addresses, other contents: a result cached by pointer is stale
                drawn = number
                fresh = make_inputs(self.problem, distribution="randn", seed=self.seed + number, device=self.device)
                for tensor, x in named(inputs).items():
                    x.data.copy_(named(fresh)[tensor])
            late.pop(name, None)
            _set_fp32_maths(operation.problem.precision)
            operation.prepare()
            self._poison(operation)

        def after_burst(name: str) -> None:
            late[name] = operations[name].snapshot()
            operations[name].release()

        calls: dict[str, Callable[[], object]] = dict(operations)
        samples = timing.time_interleaved(
            calls, timer, seconds=seconds * len(calls), before_burst=before_burst, after_burst=after_burst
        )
        state = device_state(self.device)
        reference = make_inputs(self.problem, distribution="randn", seed=self.seed + drawn, device=self.device)
        judge = Judge(self.problem, reference)
        for name, operation in operations.items():
            emit({"event": "stage", "cell": int(name), "stage": "judge the timed outputs"})
            precision = operation.problem.precision
            verdict = judge.check(late.pop(name), precision)
            answer: dict[str, Any] = {"status": "ok", "reason": ""}
            if not verdict.ok:
                answer = {"status": "wrong", "reason": f"outputs of the timed calls: {verdict.reason}"}
            elif not all(torch.equal(x, named(reference)[tensor]) for tensor, x in named(inputs).items()):
                answer = {"status": "wrong", "reason": "a timed call wrote into its inputs"}
            else:
                answer |= self._after_hours(operation, timer, statistics.median(samples[name].all()), graph)
            emit({
                "event": "timed", "cell": int(name), "error": verdict.error, "device_state": state,
                "rounds": samples[name].rounds, **answer,
            })  # fmt: skip

    def _after_hours(self, operation: Operation, timer, median_ms: float, graph: bool) -> dict[str, Any]:
        # Work that the timed stream does not show still shows on the wall clock.
        with fp32_maths(operation.problem.precision):
            operation.prepare()
            host_us = timer.host(operation, max(1, min(50, round(HOST_MS / median_ms))))
            answer: dict[str, Any] = {"host_us": host_us}
            if isinstance(timer, timing.CudaTimer):
                operation.prepare()
                wall = min(timer.wall(operation) for _ in range(3))
                if wall > 1.5 * median_ms + host_us / 1e3 + LATE_MS:
                    reason = (
                        f"a call takes {wall:.2f} ms until the device is idle, {median_ms:.2f} ms on its own stream"
                    )
                    return {"status": "wrong", "reason": reason}
                if graph and operation.problem.pass_ == "fwd":
                    answer["graph_ms"] = timing.graph_replay_ms(operation, timer)
            operation.release()
        return answer


def named(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The tensors a call reads, by name."""
    return {"q": inputs.q, "k": inputs.k, "v": inputs.v, "do": inputs.do}


class CaughtCheating(Exception):
    """A call did something no result can be believed after."""


class fp32_maths:
    """Within it torch's own float32 matmuls are of the class asked for (TF32 or not), as before it after."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32
        _set_fp32_maths(self.precision)

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before


def _set_fp32_maths(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def kernel_names(operation: Operation, device: torch.device) -> list[str]:
    """Device kernels of one call in order of first use; on the CPU, torch's operators."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    operation.prepare()
    kinds = [activity.CUDA if cuda else activity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        operation()
        if cuda:
            torch.cuda.synchronize(device)
    operation.release()
    names = (event.name for event in profile.events() or ())
    return list(dict.fromkeys(name[:120] for name in names if not BOOKKEEPING.match(name)))


def fallback(backend: Backend, kernels: list[str], device: torch.device) -> str | None:
    """What shows that somebody else's kernels did the work of `backend`, if anything does."""
    declared = backend.capability_on(device).kernels
    if declared is None:
        return None
    own = re.compile(declared, re.IGNORECASE)
    if strangers := [name for name in kernels if HEAVY.search(name) and not own.search(name)]:
        return f"not its own kernel ran: {strangers[0]} (it declares {declared!r})"
    if device.type == "cuda" and kernels and not any(own.search(name) for name in kernels):
        return f"no kernel of its own ran (it declares {declared!r}), but {kernels[0]}"
    return None


def _guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of `work`, or the status that its exception stands for."""
    try:
        return work()
    except CaughtCheating as error:
        return {"status": "wrong", "reason": str(error)}
    except ImportError as error:
        return {"status": "unavailable", "reason": _first_line(error)}
    except NotImplementedError as error:
        return {"status": "unsupported", "reason": str(error) or "not implemented"}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": "oom", "reason": _first_line(error)}
    except Exception as error:  # whatever a backend raises is its row, not the end of the sweep
        if "can't allocate memory" in str(error):
            return {"status": "oom", "reason": _first_line(error)}
        return {"status": "error", "reason": _describe(error)}


def _describe(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_first_line(error)} ({where.filename.rpartition('/')[2]}:{where.lineno})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _stop_if_dead(device: torch.device) -> None:
    # After a CUDA error nothing in this process can be trusted; the parent starts another one.
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
        except RuntimeError as error:
            raise SystemExit(DEAD) from error
