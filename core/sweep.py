"""The parent's side of a sweep: hands groups to a worker, turns its answers into Results, survives its end."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flash2.core import peaks
from flash2.core.compare import quantiles, speedup
from flash2.core.isolate import Worker, WorkerGone
from flash2.core.problem import Problem
from flash2.core.results import Result, fingerprint

HANDLER = "flash2.core.cell:handle"
# Where compilers keep what they made: our own and most others', Triton, torch.compile, numba, CuPy, the CUDA driver.
CACHES = (
    "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH",
)  # fmt: skip
START_SECONDS = 300.0  # importing torch from a cold disk, and measuring the ceilings


@dataclass(slots=True)
class Sweep:
    """One sweep's settings, and the worker that is alive now."""

    resolve: str  # "module:function" that turns a backend's name into a Backend
    device: str = "auto"
    seed: int = 0
    timeout: float = 300.0
    seconds: float = 1.0
    graph: bool = False
    cold: bool = False  # the worker begins with empty compile caches
    environment: dict[str, Any] = field(default_factory=dict)
    on_stage: Callable[[str, str, str], None] = lambda backend, precision, stage: None
    _worker: Worker | None = None
    _caches: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)

    def hello(self, backends: list[str]) -> tuple[str, dict[str, dict[str, Any]]]:
        """The device found, and of each backend why it is unavailable, its version and its classes."""
        found: dict[str, dict[str, Any]] = {}
        device = self.device
        for event in self._ask({"op": "hello", "backends": backends, "seed": self.seed}, START_SECONDS):
            if event["event"] == "environment":
                device, self.environment = event["device"], event["environment"]
                if self.cold:
                    self.environment["caches"] = "empty"
            else:
                found[event["name"]] = event
        return device, found

    def why_not(self, backends: list[str], problem: Problem) -> list[dict[str, Any]]:
        """Of each backend every reason why it cannot run `problem`, and the nearest one it can."""
        return list(self._ask({"op": "why_not", "backends": backends, "problem": problem.to_dict()}, START_SECONDS))

    def doctor(self) -> list[dict[str, Any]]:
        """What the machine has and lacks, as rows of {check, found, remedy}."""
        return list(self._ask({"op": "doctor"}, START_SECONDS))

    def run_group(self, problem: Problem, cells: list[tuple[str, str]], baseline: str) -> list[Result]:
        """One Result a cell, all timed in turn in one process.

        A cell that crashes or hangs the worker ends itself only: the others run again without it.
        """
        answers: dict[int, dict[str, Any]] = {}
        while pending := [number for number in range(len(cells)) if number not in answers]:
            for number, answer in self._attempt(problem, [cells[n] for n in pending]):
                answers[pending[number]] = answer
        return self._results(problem, cells, [answers[n] for n in range(len(cells))], baseline)

    def _attempt(self, problem: Problem, cells: list[tuple[str, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
        # Yields (cell, final answer); at least one, so that the caller's loop ends.
        judged: dict[int, dict[str, Any]] = {}
        final: set[int] = set()
        current, stage = 0, "start"
        request = {
            "op": "group", "problem": problem.to_dict(), "cells": cells, "seconds": self.seconds,
            "seed": self.seed, "graph": self.graph,
        }  # fmt: skip
        try:
            for event in self._ask(request, self.timeout):
                kind, number = event.pop("event"), event.pop("cell")
                if kind == "stage":
                    current, stage = number, event["stage"]
                    backend, precision = cells[number]
                    self.on_stage(backend, precision, stage)
                elif kind == "judged" and event["status"] == "judged":
                    judged[number] = event
                else:
                    final.add(number)
                    yield number, {**judged.get(number, {}), **event}
        except WorkerGone as gone:
            if current not in final:
                yield current, {**judged.get(current, {}), "status": gone.status, "reason": f"{gone} (stage: {stage})"}

    def _ask(self, request: dict[str, Any], deadline: float) -> Iterator[dict[str, Any]]:
        worker = self._worker = self._worker or Worker(HANDLER, self._empty_caches() if self.cold else {})
        if request["op"] != "doctor":
            request |= {"resolve": self.resolve}
        try:
            yield from worker.events(request | {"device": self.device}, deadline)
        except WorkerGone:
            self._worker = None
            raise

    def _empty_caches(self) -> dict[str, str]:
        # A worker that takes over from a dead one compiles anew too.
        self._caches.append(tempfile.TemporaryDirectory(prefix="flash2-cold-", ignore_cleanup_errors=True))
        return {variable: os.path.join(self._caches[-1].name, variable) for variable in CACHES}

    def _results(
        self, problem: Problem, cells: list[tuple[str, str]], answers: list[dict[str, Any]], baseline: str
    ) -> list[Result]:
        medians = [[statistics.median(burst) for burst in answer.get("rounds", [])] for answer in answers]
        ok = [
            self._too_fast(problem, cell, a) is None and a["status"] == "ok"
            for cell, a in zip(cells, answers, strict=True)
        ]
        base_of = {  # speed-ups form only within one class
            precision: number for number, (name, precision) in enumerate(cells) if name == baseline and ok[number]
        }
        results = []
        for number, ((name, precision), answer) in enumerate(zip(cells, answers, strict=True)):
            mine = problem.replace(precision=precision)
            status, reason = answer["status"], answer["reason"]
            if status == "ok" and (impossible := self._too_fast(problem, (name, precision), answer)):
                status, reason = "error", impossible
            figures: dict[str, Any] = {}
            if status == "ok":
                ms = quantiles(list(itertools.chain(*answer["rounds"])))
                figures = {"ms": ms, "rounds": tuple(medians[number]), "tflops": mine.flops / ms.median / 1e9}
                found = peaks.peak(self.environment["device"], precision, self.environment["ceilings"])
                figures["peak"] = None if found is None else {"tflops": found.tflops, "source": found.source}
                base = base_of.get(precision)
                if base is not None and base != number:
                    figures["speedup"] = speedup(baseline, medians[base], medians[number], paired=True)
                figures |= {key: answer.get(key) for key in ("host_us", "graph_ms")}
            results.append(
                Result(
                    backend=name, problem=mine, status=status, reason=reason, error=answer.get("error"),
                    build_ms=answer.get("build_ms"), peak_bytes=answer.get("peak_bytes"),
                    kernels=tuple(answer.get("kernels", ())), device_state=answer.get("device_state"),
                    environment=self.environment, **figures,
                )
            )  # fmt: skip
        return results

    def _too_fast(self, problem: Problem, cell: tuple[str, str], answer: dict[str, Any]) -> str | None:
        if answer["status"] != "ok":
            return None
        mine = problem.replace(precision=cell[1])
        floor = peaks.floor_ms(
            self.environment["device"], cell[1], mine.flops, mine.bytes, self.environment["ceilings"]
        )
        best = min(itertools.chain(*answer["rounds"]))
        if best >= floor:
            return None
        return f"{best:.4g} ms is faster than the device can be ({floor:.4g} ms); the time is not of this work"

    def fingerprint(self) -> str:
        """The environment's, by which --resume knows a finished cell."""
        return fingerprint(self.environment)

    def close(self, *, at_once: bool = False) -> None:
        """End the worker, `at_once` if it may be busy."""
        if self._worker is not None:
            self._worker.kill() if at_once else self._worker.close()
            self._worker = None
        while self._caches:
            self._caches.pop().cleanup()
