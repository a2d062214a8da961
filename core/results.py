"""Result, and the append-only JSONL file it lives in. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash2.core.compare import Quantiles, Speedup
from flash2.core.problem import Problem

SCHEMA = 1
STATUSES = ("ok", "unsupported", "unavailable", "wrong", "oom", "timeout", "crash", "error")
# What may differ between two runs that --resume may still merge: readings, not settings.
VOLATILE = ("ceilings", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One cell: a backend on a problem. tflops exists if and only if the status is ok.

    ms: milliseconds of one call. rounds: median milliseconds of each interleaved round, from which
    intervals are resampled. peak: {tflops, source} that tflops is divided by. error: {max, rms,
    worst_row}. host_us: microseconds until an eager call returns; graph_ms: replay of a CUDA graph.
    build_ms: the first call, with whatever it compiled or tuned. device_state: clock and power.
    """

    backend: str
    problem: Problem
    status: str
    reason: str = ""
    ms: Quantiles | None = None
    rounds: tuple[float, ...] = ()
    tflops: float | None = None
    peak: dict[str, Any] | None = None
    error: dict[str, float] | None = None
    speedup: Speedup | None = None
    host_us: float | None = None
    graph_ms: float | None = None
    build_ms: float | None = None
    peak_bytes: int | None = None
    kernels: tuple[str, ...] = ()
    device_state: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}; known: {', '.join(STATUSES)}")
        if (self.tflops is not None) != (self.status == "ok"):
            raise ValueError(f"{self.status} result must {'' if self.status == 'ok' else 'not '}carry TFLOP/s")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.status} result must say why")

    @property
    def peak_fraction(self) -> float | None:
        """tflops over the peak of its class, where a peak is known."""
        return self.tflops / self.peak["tflops"] if self.tflops is not None and self.peak else None

    @property
    def key(self) -> tuple[str, str, str]:
        """What --resume and compare match records by: backend, problem, environment."""
        return (self.backend, self.problem.key(), fingerprint(self.environment))

    def to_record(self) -> dict[str, Any]:
        """The JSON object of one line."""
        record = {"schema": SCHEMA, **dataclasses.asdict(self)}
        record["problem"] = self.problem.to_dict()
        record["peak_fraction"] = self.peak_fraction
        return _rounded(record)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Result:
        """Inverse of to_record; ValueError says what the record lacks."""
        if record.get("schema") != SCHEMA:
            raise ValueError(f"schema {record.get('schema')!r}, this version reads {SCHEMA}")
        fields = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name in record}
        if missing := [name for name in ("backend", "problem", "status") if name not in fields]:
            raise ValueError(f"no {missing[0]!r}")
        fields["problem"] = Problem.from_dict(fields["problem"])
        for name, kind in (("ms", Quantiles), ("speedup", Speedup)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        for name in ("rounds", "kernels"):
            fields[name] = tuple(fields.get(name) or ())
        return cls(**fields)


def fingerprint(environment: dict[str, Any]) -> str:
    """Eight hex digits of everything in the environment that is a setting, not a reading."""
    stable = {key: value for key, value in environment.items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:8]


class ResultFile:
    """Append-only JSONL: one fsynced line a result, so that a kill at any moment loses no finished cell."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open for appending. Raises OSError when it cannot be written, before anything is measured."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  lives as long as the sweep; close() ends it
        if self._file.tell() and _last_byte(self.path) != b"\n":
            self._write(b"\n")  # a torn last line costs only itself

    def append(self, result: Result) -> None:
        """Write one line and wait until it is on disk."""
        self.append_record(result.to_record())

    def append_record(self, record: dict[str, Any]) -> None:
        """append() of any JSON object."""
        self._write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file; every line is already on disk."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """All results of a file, the latest of each key, in order of first appearance.

    A torn line (no newline, or the remains of one that a later run closed) is skipped;
    any other line that is no record raises ValueError naming file, line and fault.
    """
    results: dict[tuple[str, str, str], Result] = {}
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            result = Result.from_record(record)
        except (ValueError, TypeError, KeyError) as error:
            if _torn(line):
                continue
            raise ValueError(f"{path}, line {number} is not a result: {error}") from error
        results[result.key] = result
    return list(results.values())


def latest(results: Iterable[Result]) -> dict[tuple[str, str], Result]:
    """The last result of each (backend, problem), whatever the environment."""
    return {(r.backend, r.problem.key()): r for r in results}


def _torn(line: bytes) -> bool:
    # A record is one line that begins {"schema": and ends }; a prefix of that is a torn write.
    start = b'{"schema":'
    return (line.startswith(start) or start.startswith(line)) and not line.endswith(b"}")


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _rounded(value: Any) -> Any:
    # Six significant digits say all a clock or an error knows; NaN and Inf are not JSON.
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
