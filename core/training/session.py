"""The parent's side of training: one worker process a run, a progress bar, a line in the file, a table. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flash2.core.compare import Quantiles
from flash2.core.isolate import Worker, WorkerGone
from flash2.core.report import FORMATS
from flash2.core.results import ResultFile
from flash2.core.training import options, runs
from flash2.core.training.options import Options
from flash2.core.training.runs import Run

HANDLER = "flash2.core.training.trainer:handle"
START_SECONDS = 300.0
ROUNDS = {"cpu": 0, "cuda": 5}  # of the race of steps
MACHINE_BACKENDS = {"cpu": ("sdpa", "naive", "numba"), "cuda": ("sdpa", "sdpa-cudnn", "triton")}


@dataclass(slots=True, kw_only=True)
class Training:
    """Train each of `backends` (none: `defaults` of the device type) with the same options.

    seeds: the first for every backend, the others for sdpa alone: the spread between runs that a backend is held against.
    given, size: options as chosen(). out: append runs to this file; resume: skip runs that it has. checkpoints: a folder
    for one checkpoint a run, written every `save_every` steps, and gone on from with `resume`. log: append each step's
    loss to this file as JSON. silent: seconds a worker may be silent. rounds: in which the backends, where they are
    several, do steps in turn before the first of them trains (none: ROUNDS of the device type).
    """

    backends: Sequence[str] = ()
    given: dict[str, Any] = field(default_factory=dict)
    size: str | None = None
    device: str = "auto"
    seeds: Sequence[int] = (0,)
    out: Path | None = None
    resume: bool = False
    checkpoints: Path | None = None
    save_every: int = 0
    log: Path | None = None
    silent: float = 300.0
    rounds: int | None = None
    defaults: Mapping[str, Sequence[str]] = field(default_factory=lambda: MACHINE_BACKENDS)

    def run(self) -> list[Run]:
        """Every run, in order. ValueError and OSError are the user's to mend; a run that fails is a row."""
        finished = {run.key: run for run in runs.read_runs(self.out)} if self._may_skip() and self.out else {}
        file = ResultFile(self.out) if self.out else None
        log = ResultFile(self.log) if self.log else None
        worker: Worker | None = Worker(HANDLER)
        found: list[Run] = []
        try:
            (hello,) = worker.events({"op": "hello", "device": self.device, "seed": self.seeds[0]}, START_SECONDS)
            device, kind = hello["device"], hello["device"].partition(":")[0]
            bases = []
            for backend, seed in self._plan(self.backends or self.defaults[kind]):
                asked = options.chosen(self.given | {"seed": seed}, self.size, kind)
                environment = hello["environment"] | {"seed": seed}
                bases.append(
                    Run(backend=backend, status="error", reason="-", options=asked.to_dict(), environment=environment)
                )
            names = list(dict.fromkeys(base.backend for base in bases))
            rounds = ROUNDS[kind] if self.rounds is None else self.rounds
            turns: dict[str, Quantiles] = {}
            if rounds and len(names) > 1 and any(base.key not in finished for base in bases):
                turns = self._race(worker, names, bases[0].options, device, rounds)
                worker.close()
                worker = None
            for base in bases:
                if base.key in finished:
                    found.append(finished[base.key])
                    continue
                worker = worker or Worker(HANDLER)
                found.append(self._one(worker, dataclasses.replace(base, turns=turns), device, log))
                if file:
                    file.append_record(found[-1].to_record())
                worker.close()
                worker = None
        except WorkerGone as gone:
            raise ValueError(f"no worker could be started: {gone}") from None
        except KeyboardInterrupt:
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            for opened in (worker, file, log):
                if opened is not None:
                    opened.close()
        return found

    def _may_skip(self) -> bool:
        return self.resume and self.out is not None and self.out.exists()

    def _plan(self, backends: Sequence[str]) -> list[tuple[str, int]]:
        return [(name, seed) for name in backends for seed in self.seeds[: None if name == "sdpa" else 1]]

    def _race(
        self, worker: Worker, names: list[str], asked: dict[str, Any], device: str, rounds: int
    ) -> dict[str, Quantiles]:
        # Step times of the backends in turn; who is left out, and the loss of the worker, go to stderr.
        request = {"op": "race", "backends": names, "device": device, "options": asked, "rounds": rounds}
        turns: dict[str, Quantiles] = {}
        bar = tqdm(
            total=(rounds + 1) * len(names), unit="turn", file=sys.stderr, disable=None, dynamic_ncols=True,
            desc="steps in turns", leave=False,
        )  # fmt: skip
        try:
            for event in worker.events(request, self.silent):
                if event["event"] == "turn":
                    bar.update()
                elif event["event"] == "out":
                    tqdm.write(f"steps in turns: without {event['backend']}: {event['reason']}", file=sys.stderr)
                elif event["event"] == "end":
                    turns = {name: Quantiles(**spread) for name, spread in event["turns"].items()}
        except WorkerGone as gone:
            tqdm.write(f"no steps in turns: {gone}", file=sys.stderr)
        finally:
            bar.close()
        return turns

    def _one(self, worker: Worker, base: Run, device: str, log: ResultFile | None) -> Run:
        asked = Options(**base.options)
        request = {
            "op": "train", "backend": base.backend, "device": device, "options": asked.to_dict(),
            "file": str(self.checkpoints / f"{_file_name(base)}.pt") if self.checkpoints else None,
            "save_every": self.save_every, "resume": self.resume,
        }  # fmt: skip
        losses: list[float] = []
        validation: list[tuple[int, float]] = []
        end: dict[str, Any] = {"status": "error", "reason": "the worker said nothing of its end"}
        bar = tqdm(
            total=asked.steps, unit="step", file=sys.stderr, disable=None, dynamic_ncols=True, desc=base.label, leave=False
        )  # fmt: skip
        shown: dict[str, str] = {}
        refused = None
        began = time.perf_counter()
        try:
            for event in worker.events(request, self.silent):
                kind = event["event"]
                if kind == "start":
                    losses, validation = list(event["losses"]), [tuple(v) for v in event["validation"]]
                    bar.update(event["step"])
                elif kind == "step":
                    losses.append(event["loss"])
                    passed, began = time.perf_counter() - began, time.perf_counter()
                    shown |= {"loss": f"{event['loss']:.3f}", "tokens/s": f"{asked.tokens / passed:.3g}"}
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                elif kind == "share":
                    shown["attention"] = f"{100 * event['share']:.0f}%"
                elif kind == "refused":
                    refused = event["reason"]
                elif kind == "validation":
                    validation.append((event["step"], event["loss"]))
                    shown["validation"] = f"{event['loss']:.3f}"
                elif kind == "end":
                    end = {name: value for name, value in event.items() if name != "event"}
                if log and kind in ("step", "validation", "share"):
                    log.append_record({"backend": base.backend, "seed": base.seed, **event})
        except WorkerGone as gone:
            end = {"status": gone.status, "reason": f"{gone} (after {len(losses)} steps)"}
        finally:
            bar.close()
        if refused is not None:
            raise ValueError(refused)
        if end.get("step_ms") is not None:
            end["step_ms"] = Quantiles(**end["step_ms"])
        return dataclasses.replace(base, losses=tuple(losses), validation=tuple(validation), **end)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What Training takes beside backends and seeds, and every option of a run."""
    options.add_arguments(parser)
    group = parser.add_argument_group("running and output")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    group.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a line a run here")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss curves (needs matplotlib)")
    group.add_argument("--log", type=Path, metavar="FILE.jsonl", help="append each step's loss here")
    group.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep a checkpoint of each run here")
    group.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between them (default: 100)")
    group.add_argument("--resume", action="store_true", help="skip runs that --out has, go on from --checkpoints")
    group.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="a silent worker is stopped (default: 300)"
    )
    group.add_argument(
        "--rounds", type=int, metavar="N",
        help="of steps in turns, before several backends train; 0 for none (default: 5 on a GPU, 0 on a CPU)",
    )  # fmt: skip
    group.add_argument("--format", choices=FORMATS, default="table", help="of the table (default: table)")


def from_arguments(parsed: argparse.Namespace, backends: Sequence[str], seeds: Sequence[int] = ()) -> Training:
    """The Training that parsed arguments of add_arguments() ask for. Raises ValueError for options that cannot be."""
    given = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(Options) if hasattr(parsed, f.name)}
    for kind in options.DEVICE_SIZES:
        options.chosen(given, parsed.size, kind)  # what no device can run is refused before a worker starts
    if parsed.save_every < 1 or not parsed.timeout > 0:
        raise ValueError("save-every must be at least 1, timeout above 0")
    if parsed.rounds is not None and parsed.rounds < 0:
        raise ValueError(f"rounds must be 0 or more, not {parsed.rounds}")
    if parsed.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "flash2-triton[plots]"')
    return Training(
        backends=backends, given=given, size=parsed.size, device=parsed.device,
        seeds=seeds or (given.get("seed", 0),), out=parsed.out, resume=parsed.resume,
        checkpoints=parsed.checkpoints, save_every=parsed.save_every, log=parsed.log, silent=parsed.timeout,
        rounds=parsed.rounds,
    )  # fmt: skip


def _file_name(run: Run) -> str:
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in run.backend)
    return stem if run.seed == 0 else f"{stem}-{run.seed}"
