"""The training loop of one backend: the worker's side. Losses, times and memory go out as JSON events.

The time of a step is the time from the end of the one before to its own end: device events on CUDA, the monotonic
clock on a CPU. Attention's share is measured in a few steps only, which then count for nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flash2 import core
from flash2.core.cell import Emit, pick_device
from flash2.core.compare import quantiles
from flash2.core.contract import Backend
from flash2.core.environment import PeakMemory, device_state, environment
from flash2.core.mha import KVCache, MultiHeadAttention
from flash2.core.training import checkpoint, corpus
from flash2.core.training.gpt import GPT
from flash2.core.training.options import Options

BETAS = (0.9, 0.95)
WARM = 5  # first steps, which compile, tune and fill caches: in no time
SAMPLED = 5  # steps in which attention is timed
BURST = 8  # steps of a backend in a row, in a race
SETTLE = 2  # of them, the first after a switch: in no time
SAMPLE_SECONDS = 15.0  # most time to spend on the sample of text: some kernels plan anew for every length


class Diverged(Exception):
    """The loss is no number any more."""


def handle(emit: Emit, request: dict[str, Any]) -> None:
    """Answer one request: `hello` (the device and what it is), `race` (step times of several backends in turn) or
    `train`; a failed run ends with its status in words."""
    {"hello": _hello, "race": _race, "train": _train}[request.pop("op")](emit, **request)


def _hello(emit: Emit, device: str, seed: int) -> None:
    where = pick_device(device)
    emit({"event": "hello", "device": str(where), "environment": environment(where, seed, ceilings=False)})


def _train(
    emit: Emit, backend: str, device: str, options: dict[str, Any], file: str | None, save_every: int, resume: bool
) -> None:
    path = Path(file) if file else None
    try:
        where = pick_device(device)
        chosen = core.find_backend(backend, where.type)
        if (reason := chosen.unavailable()) is not None:
            emit({"event": "end", "status": "unavailable", "reason": reason})
            return
        try:
            trainer = Trainer(Options(**options), chosen, where, emit)
            if resume and path is not None and path.exists():
                trainer.restore(path)
        except (ValueError, FileNotFoundError, checkpoint.CheckpointError) as error:  # the user's to mend
            emit({"event": "refused", "reason": str(error)})
            return
        figures = trainer.run(path, save_every)
    except (checkpoint.CheckpointError, Diverged) as error:
        emit({"event": "end", "status": "error", "reason": str(error)})
    except ImportError as error:
        emit({"event": "end", "status": "unavailable", "reason": str(error)})
    except NotImplementedError as error:
        emit({"event": "end", "status": "unsupported", "reason": str(error)})
    except torch.OutOfMemoryError as error:
        emit({"event": "end", "status": "oom", "reason": str(error).splitlines()[0]})
    except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportAttributeAccessIssue]
        first = " ".join(str(error).partition("\n\n")[0].split())
        reason = f"torch.compile failed: {first}; --no-compile trains without it"
        emit({"event": "end", "status": "error", "reason": reason})
    except (
        Exception
    ) as error:  # of a backend, whatever it is: this run's row says it, the next run has a process of its own
        emit({"event": "end", "status": "error", "reason": f"{type(error).__name__}: {error}"})
    else:
        emit({"event": "end", "status": "ok", "reason": "", **figures})


def _race(emit: Emit, backends: list[str], device: str, options: dict[str, Any], rounds: int) -> None:
    # A Trainer each, so that all do the same steps and none can spoil another's weights. Round 0 warms up.
    where = pick_device(device)
    racers: dict[str, Trainer] = {}
    times: dict[str, list[float]] = {name: [] for name in backends}
    for number in range(rounds + 1):
        first = number % len(backends)  # whoever began goes last
        for name in backends[first:] + backends[:first]:
            if name not in times:
                continue
            try:
                if number == 0:
                    chosen = core.find_backend(name, where.type)
                    if (reason := chosen.unavailable()) is not None:
                        raise ImportError(reason)
                    racers[name] = Trainer(Options(**options), chosen, where, lambda event: None)
                burst = racers[name].burst(BURST)
                times[name] += burst[SETTLE:] if number else []
            except Exception as error:  # of a backend, whatever it is: the row of its own run will say it
                racers.pop(name, None)
                del times[name]
                reason = str(error).partition("\n")[0] or type(error).__name__
                emit({"event": "out", "backend": name, "reason": reason})
            else:
                emit({"event": "turn", "backend": name})
        if len(times) < 2:  # nobody is left to be compared with
            times.clear()
            break
    emit({"event": "end", "turns": {name: dataclasses.asdict(quantiles(spans)) for name, spans in times.items()}})


class Trainer:
    """One model, one backend, one device. The weights and the batches depend on the seed alone."""

    def __init__(self, options: Options, backend: Backend, device: torch.device, emit: Emit) -> None:
        self.options, self.backend, self.device, self.emit = options, backend, device, emit
        self.memory = PeakMemory(device)
        torch.manual_seed(options.seed)  # dropout
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
        self.model = GPT(options, backend).to(device)
        if options.compile:
            self.model.compile_around_attention()
        self.optimizers = self._optimizers()
        text = corpus.standard_library()
        if min(len(text.train), len(text.validation)) <= options.context:
            raise ValueError(f"context {options.context} is longer than the text ({len(text.validation)} bytes)")
        self.text = text.train.to(device)
        self.validation_text = corpus.validation_windows(
            text.validation.to(device), options.validation_tokens, options.context
        )
        self.files, self.step = text.files, 0
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.saved: tuple[Path, int] | None = None
        self.clock = StepClock(device)
        self.shares: dict[int, AttentionClock] = {}

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.model.parameters())

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        options = self.options
        matrices = [weight for block in self.model.blocks for weight in block.parameters() if weight.dim() == 2]
        inside = {id(weight) for weight in matrices}
        others = [weight for weight in self.model.parameters() if id(weight) not in inside]
        decayed = {"params": matrices, "weight_decay": options.weight_decay}
        found: list[torch.optim.Optimizer] = []
        if options.optimizer == "muon":  # its update made as long as AdamW's, so that one learning rate serves both
            found.append(torch.optim.Muon([decayed], lr=options.lr, adjust_lr_fn="match_rms_adamw"))
        rest = [{"params": others, "weight_decay": 0.0}]
        groups = rest if found else [decayed, *rest]
        found.append(torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=self.device.type == "cuda"))
        return found

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError for one of another model."""
        state = checkpoint.load(path, self.options.model())
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.losses = state["step"], state["losses"]
        self.validation = [(step, loss) for step, loss in state["validation"]]
        self.saved = (path, self.step)

    def save(self, path: Path) -> None:
        """A checkpoint of the steps done so far."""
        state = {
            "shape": self.options.model(), "backend": self.backend.name, "options": self.options.to_dict(),
            "model": self.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "losses": self.losses, "validation": self.validation,
        }  # fmt: skip
        checkpoint.save(path, state)
        self.saved = (path, self.step)
        self.emit({"event": "saved", "step": self.step})

    def run(self, path: Path | None = None, save_every: int = 0) -> dict[str, Any]:
        """Train up to options.steps, with a checkpoint at `path` every `save_every` steps and at the end; the figures."""
        options, first = self.options, self.step
        self.emit(
            {"event": "start", "step": first, "losses": self.losses, "validation": self.validation,
             "parameters": self.parameters}
        )  # fmt: skip
        watched = {options.steps * k // (SAMPLED + 1) for k in range(1, SAMPLED + 1)}
        watched -= set(range(first + WARM))
        pending: Reading | None = None
        self.clock.begin()
        for step in range(first, options.steps):
            if step in watched:
                self.shares[step] = AttentionClock(self.device)
            with self.shares[step].watch(self.model.attentions()) if step in watched else contextlib.nullcontext():
                loss = self.train_step(step)
            self.clock.end(step)
            late, pending = pending, Reading(step, loss)
            if late:  # one step late, so that the device never waits for the host to read a loss
                self._note(late)
            self.step = step + 1
            due = self.step % options.validate_every == 0 or self.step == options.steps
            keep = path is not None and save_every and (self.step % save_every == 0 or self.step == options.steps)
            if due or keep:
                self._note(pending)
                pending = None
                if due:
                    self.validate()
                if keep and path is not None:
                    self.save(path)
                self.clock.begin()
        if not self.validation or self.validation[-1][0] != self.step:
            self.validate()
        return self._figures(first) | {"sample": self.sample()}

    def train_step(self, step: int) -> torch.Tensor:
        """One step on the batch of `step`; the loss, still on the device."""
        options = self.options
        windows = corpus.batch(self.text, options.batch, options.context + 1, options.seed, step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = options.learning_rate(step)
        with self._maths():
            loss = self.model.loss(windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def burst(self, count: int) -> list[float]:
        """Milliseconds of each of the next `count` steps, which begin anew after the last of the options. Raises
        Diverged."""
        steps, readings = range(self.step, self.step + count), []
        self.clock.begin()
        for step in steps:
            loss = self.train_step(step % self.options.steps)
            self.clock.end(step)
            readings.append(Reading(step, loss))
        self.step = steps.stop
        for reading in readings:
            self._note(reading)
        return [self.clock.milliseconds(step) for step in steps]

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per byte of the validation windows, by the same backend."""
        self.model.eval()
        total = 0.0
        for windows in self.validation_text.split(self.options.batch):
            with self._maths():
                total += self.model.loss(windows).item() * len(windows)
        self.model.train()
        loss = total / len(self.validation_text)
        self.validation.append((self.step, loss))
        self.emit({"event": "validation", "step": self.step, "loss": loss})
        return loss

    def sample(self) -> str:
        """Text that the model goes on with at the beginning of a file; empty where none was asked for, or where the
        backend cannot attend to the first byte alone (cuDNN), which is no reason to lose a trained run."""
        count = min(self.options.sample, self.options.context - 1)
        if not count or self.backend.compiles_per_shape:  # every byte would be a new shape
            return ""
        self.model.eval()
        begin, found = time.perf_counter(), bytearray()
        # Each length is a new shape: nothing to compile for.
        with self._maths(), torch.compiler.set_stance("force_eager"), contextlib.suppress(NotImplementedError):
            for byte in self.model.generate(corpus.SEPARATOR, count, seed=self.options.seed):
                found.append(byte)
                if time.perf_counter() - begin > SAMPLE_SECONDS:
                    break
        self.model.train()
        return found.decode("utf-8", errors="replace")

    def _maths(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _note(self, reading: Reading) -> None:
        value = reading.value()
        if not math.isfinite(value):
            kept = (
                f"the last checkpoint is {self.saved[0]}, of step {self.saved[1]}"
                if self.saved
                else "no checkpoint was kept"
            )
            raise Diverged(f"the loss of step {reading.step} is {value} with backend {self.backend.name!r}; {kept}")
        self.losses.append(value)
        self.emit({"event": "step", "step": reading.step, "loss": value})
        if reading.step in self.shares:
            self.emit({"event": "share", "step": reading.step, "share": self._share(reading.step)})

    def _share(self, step: int) -> float:
        return self.shares[step].milliseconds() / self.clock.milliseconds(step)

    def _figures(self, first: int) -> dict[str, Any]:
        steps = self.clock.steps()
        counted = [step for step in steps if step >= first + WARM and step not in self.shares] or steps
        warm = [self.clock.milliseconds(step) for step in counted]
        parts = [self._share(step) for step in self.shares]
        spread = quantiles(warm or [0.0])  # a checkpoint at its last step has nothing left to do
        return {
            "parameters": self.parameters,
            "step_ms": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
            "attention_share": statistics.median(parts) if parts else None,
            "peak_bytes": self.memory.bytes(),
            "device_state": device_state(self.device),
        }


class Reading:
    """A step's loss on its way to the host, which may go on meanwhile."""

    def __init__(self, step: int, loss: torch.Tensor) -> None:
        self.step, self._event, self._value = step, None, loss
        if loss.is_cuda:
            self._value = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> float:
        """The loss; waits for its own step, not for those queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


def _moment(device: torch.device) -> Any:
    # Now: an event in the stream's order on CUDA, the clock on a CPU.
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    # Milliseconds between two moments; on CUDA both must have happened.
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)


class StepClock:
    """The time from the end of each step to the end of the next; whatever else happens in between starts it anew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: Any = None
        self._spans: dict[int, tuple[Any, Any]] = {}

    def begin(self) -> None:
        """A step begins now, not at the end of the one before."""
        self._last = _moment(self.device)

    def end(self, step: int) -> None:
        """`step` is all queued."""
        now = _moment(self.device)
        self._spans[step] = (self._last, now)
        self._last = now

    def steps(self) -> list[int]:
        """Those that have ended."""
        return list(self._spans)

    def milliseconds(self, step: int) -> float:
        """Of one step; on CUDA the device must have finished it."""
        return _between(*self._spans[step])


class AttentionClock:
    """The time between what enters attention() and what leaves it, forward and backward, over all layers of one step.

    Autograd functions that do nothing else stand on both sides of the call, so that every backend, whether torch's or
    ours, is timed with the copies and casts that it needs around its kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: list[list[Any]] = []

    @contextlib.contextmanager
    def watch(self, attentions: list[MultiHeadAttention]) -> Iterator[None]:
        """Time these modules until the block ends."""
        for module in attentions:
            module.attend = functools.partial(self._timed, module.attend)
        try:
            yield
        finally:
            for module in attentions:
                del module.attend  # the class's own again

    def milliseconds(self) -> float:
        """The sum; on CUDA the device must have finished the step."""
        return sum(_between(*moments) for moments in self._moments)

    def _timed(
        self, attend: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        forward: list[Any] = []
        backward: list[Any] = []
        q, k, v = _Enter.apply(q, k, v, self.device, forward, backward)  # pyright: ignore[reportGeneralTypeIssues]
        o = _Leave.apply(attend(q, k, v, cache), self.device, forward, backward)
        self._moments += [forward, backward]
        return o  # pyright: ignore[reportReturnType]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, device, forward, backward):
        ctx.device, ctx.moments = device, backward
        forward.append(_moment(device))
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, dq, dk, dv):  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own signature is *args
        ctx.moments.append(_moment(ctx.device))
        return dq, dk, dv, None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, device, forward, backward):
        ctx.device, ctx.moments = device, backward
        forward.append(_moment(device))
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own signature is *args
        ctx.moments.append(_moment(ctx.device))
        return do, None, None, None
