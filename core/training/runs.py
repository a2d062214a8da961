"""Run, what came of training one backend: its line in a file, its row, its curve. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from flash2.core.compare import Quantiles
from flash2.core.results import STATUSES, fingerprint

KIND, SCHEMA = "training", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run. losses: nats per byte of each step; validation: (steps done, nats per byte).

    step_ms: milliseconds of a step; attention_share: of a step's time, forward and backward of attention; peak_bytes:
    memory beyond what the process held before the model. step_ms exists if and only if the status is ok.
    turns: milliseconds of a step by backend, from the command's race of steps; empty where there was none.
    """

    backend: str
    status: str
    options: dict[str, Any]
    reason: str = ""
    parameters: int | None = None
    losses: tuple[float, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    step_ms: Quantiles | None = None
    turns: dict[str, Quantiles] = field(default_factory=dict)
    attention_share: float | None = None
    peak_bytes: int | None = None
    sample: str = ""
    device_state: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}; known: {', '.join(STATUSES)}")
        if (self.step_ms is not None) != (self.status == "ok"):
            raise ValueError(f"{self.status} run must {'' if self.status == 'ok' else 'not '}carry a step time")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.status} run must say why")

    @property
    def seed(self) -> int:
        """Of the weights and the batches."""
        return self.options["seed"]

    @property
    def key(self) -> tuple[str, str, str]:
        """What --resume matches runs by: backend, options, environment."""
        return (self.backend, json.dumps(self.options, sort_keys=True), fingerprint(self.environment))

    @property
    def label(self) -> str:
        """The backend, and the seed where it is not 0."""
        return f"{self.backend}, seed {self.seed}" if self.seed else self.backend

    @property
    def tokens_per_s(self) -> float | None:
        """Bytes trained on in a second."""
        if self.step_ms is None:
            return None
        return self.options["batch"] * self.options["context"] / self.step_ms.median * 1e3

    @property
    def final_validation(self) -> float | None:
        """Nats per byte after the last step."""
        return self.validation[-1][1] if self.status == "ok" and self.validation else None

    def to_record(self) -> dict[str, Any]:
        """The JSON object of one line."""
        record = {"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(self)}
        for name in ("attention_share", "step_ms", "turns"):
            record[name] = _rounded(record[name], 5)
        record["losses"] = _rounded(list(self.losses), 8)  # curves of one maths differ in the seventh digit
        record["validation"] = [[step, _rounded(loss, 8)] for step, loss in self.validation]
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Run:
        """Inverse of to_record; ValueError says what the record lacks."""
        if (record.get("kind"), record.get("schema")) != (KIND, SCHEMA):
            raise ValueError(f"{record.get('kind')!r} schema {record.get('schema')!r}, not {KIND!r} {SCHEMA}")
        if missing := [name for name in ("backend", "status", "options") if name not in record]:
            raise ValueError(f"no {missing[0]!r}")
        fields = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name in record}
        fields["losses"] = tuple(fields.get("losses", ()))
        fields["validation"] = tuple((step, loss) for step, loss in fields.get("validation", ()))
        if fields.get("step_ms") is not None:
            fields["step_ms"] = Quantiles(**fields["step_ms"])
        fields["turns"] = {name: Quantiles(**spread) for name, spread in fields.get("turns", {}).items()}
        return cls(**fields)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value


def holds_runs(path: Path) -> bool:
    """Is this a file of training runs, not of benchmark cells? Its first line says."""
    with open(path, "rb") as file:
        return file.readline().startswith(b'{"kind": "training"')


def read_runs(path: Path) -> list[Run]:
    """All runs of a file, the latest of each key, in order of first appearance; a torn last line is skipped.

    Raises ValueError that names file, line and fault for any other line that is no run.
    """
    runs: dict[tuple[str, str, str], Run] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            run = Run.from_record(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            if not line.endswith(b"}"):  # a record is one line that ends }; the rest was never written
                continue
            raise ValueError(f"{path}, line {number} is not a training run: {error}") from error
        runs[run.key] = run
    return list(runs.values())


def same_work(a: Run, b: Run) -> bool:
    """Do two runs differ in backend and seed at most?"""
    return a.options | {"seed": 0} == b.options | {"seed": 0}


def baseline_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The run that `run` is held against: the first of sdpa that is ok and did the same work."""
    return next((one for one in runs if one.backend == "sdpa" and one.status == "ok" and same_work(one, run)), None)


def largest_gap(run: Run, base: Run | None) -> tuple[float, int] | None:
    """(largest |loss - base's loss| / base's loss over the steps, the step it occurs at); None without a common step."""
    gaps = [abs(a - b) / b for a, b in zip(run.losses, base.losses, strict=False)] if base else []
    return max(zip(gaps, itertools.count(), strict=False)) if gaps and run is not base else None


def _versus(run: Run, base: Run | None) -> str:
    if base is None or run is base or run.final_validation is None or base.final_validation is None:
        return ""
    return f"{100 * (run.final_validation / base.final_validation - 1):+.2f} %"


def _in_turns(run: Run, _: Run | None = None) -> str:
    own, base = run.turns.get(run.backend), run.turns.get("sdpa")
    if own is None or base is None or run.backend == "sdpa" or run.status != "ok":
        return ""
    return f"{own.median / base.median:.3f}"


def _gap(run: Run, base: Run | None) -> str:
    found = largest_gap(run, base)
    return "" if found is None else f"{found[0]:.1e} at {found[1]}"


COLUMNS: dict[str, Callable[[Run, Run | None], str]] = {
    "backend": lambda run, _: run.label,
    "status": lambda run, _: run.status,
    "step ms": lambda run, _: "" if run.step_ms is None else f"{run.step_ms.median:.4g}",
    "in turns": _in_turns,
    "tokens/s": lambda run, _: "" if run.tokens_per_s is None else f"{run.tokens_per_s:.3g}",
    "attention": lambda run, _: "" if run.attention_share is None else f"{100 * run.attention_share:.0f} %",
    "GiB": lambda run, _: "" if run.peak_bytes is None else f"{run.peak_bytes / 2**30:.3g}",
    "validation": lambda run, _: "" if run.final_validation is None else f"{run.final_validation:.4f}",
    "vs sdpa": _versus,
    "largest gap": _gap,
}


def table(runs: Sequence[Run], form: str = "table") -> str:
    """A row a run as `table` (terminal, with the reasons of those that are not ok), `markdown`, `csv` or `json`."""
    if form == "json":
        return json.dumps([run.to_record() for run in runs], indent=1)
    columns = {name: text for name, text in COLUMNS.items() if text is not _in_turns or any(map(_in_turns, runs))}
    rows = [[text(run, baseline_of(run, runs)) for text in columns.values()] for run in runs]
    if form == "csv":
        return "\n".join(",".join(f'"{cell}"' if "," in cell else cell for cell in row) for row in [[*columns], *rows])
    body = tabulate(rows, [*columns], tablefmt="pipe" if form == "markdown" else "simple", disable_numparse=True)
    if form == "markdown":
        return body
    return "\n".join([body, *(f"  {run.label}: {run.status}: {run.reason}" for run in runs if run.status != "ok")])


def summary(run: Run) -> str:
    """The model and the training of a run in one line."""
    o = run.options
    size = f"{run.parameters / 1e6:.3g} M parameters, " if run.parameters else ""
    heads = f"{o['heads']}" if o["kv_heads"] is None else f"{o['heads']}/{o['kv_heads']}"
    return (
        f"{size}{o['layers']} layers of {o['width']} channels, {heads} heads of {o['width'] // o['heads']}, "
        f"context {o['context']}, {o['batch']} sequences a step, {o['steps']} steps, {o['precision']}"
    )


def page(path: Path, shown: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The Markdown page of a file of runs: on what, the table, why not, the samples. shown: what of an environment."""
    runs = read_runs(path)
    environments = dict.fromkeys(
        "- " + ", ".join(f"{key} {value}" for key, value in shown(run.environment).items() if value is not None)
        for run in runs
    )
    lines = [f"# {path.stem}", "", f"Generated from [{path.name}]({path.name}) by `bench.py report --write`.", ""]
    lines += [*environments, *dict.fromkeys(f"- {summary(run)}" for run in runs if run.status == "ok"), ""]
    if path.with_suffix(".png").exists():
        lines += [f"![Loss curves]({path.stem}.png)", ""]
    lines += [table(runs, "markdown"), ""]
    if refused := [f"- {run.label}: {run.status}: {run.reason}" for run in runs if run.status != "ok"]:
        lines += ["## Why not", "", *refused, ""]
    for run in runs:
        if run.sample:
            lines += [f"## Sample: {run.label}", "", sample_block(run), ""]
    return "\n".join(lines)


def sample_block(run: Run) -> str:
    """The sample as a Markdown block, indented so that nothing in it can end the block."""
    clean = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in run.sample)
    return "\n".join(f"    {line}".rstrip() for line in clean.splitlines())


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draw every run's loss, and its gap to sdpa's, into one PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [run for run in runs if run.losses]
    figure, (curves, gaps) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = itertools.cycle(["-", "--", "-.", ":"])
    for number, run in enumerate(drawn):
        style = {"color": f"C{number}", "linestyle": next(styles), "label": run.label, "linewidth": 1.2}
        curves.plot(range(len(run.losses)), run.losses, **style)
        if run.validation:
            curves.plot(*zip(*run.validation, strict=True), color=f"C{number}", marker="o", markersize=4, linestyle="")
        base = baseline_of(run, drawn)
        if base is not None and run is not base:
            gap = [100 * abs(a - b) / b for a, b in zip(run.losses, base.losses, strict=False)]
            gaps.plot(range(len(gap)), [value or None for value in gap], **style)
    curves.set(xlabel="step", ylabel="nats per byte", title="training loss (dots: validation)")
    gaps.set(xlabel="step", ylabel="% of sdpa's loss", title="distance from sdpa at the same step")
    if gaps.lines:
        gaps.set_yscale("log")
        gaps.legend(fontsize=8)
    else:
        gaps.text(0.5, 0.5, "no other run beside sdpa's", ha="center", va="center", transform=gaps.transAxes)
    if drawn:
        curves.legend(fontsize=8)
    for axes in (curves, gaps):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
