"""Results -> tables: terminal, Markdown, CSV, JSON, and the generated pages under docs/results. No torch."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tabulate as tabulate_module
from tabulate import DataRow, TableFormat, tabulate

from flash2.core import ways
from flash2.core.compare import Speedup, speedup
from flash2.core.problem import PRECISIONS
from flash2.core.results import Result, latest, read_results
from flash2.core.training import runs

tabulate_module.MIN_PADDING = 0  # a column is as wide as what stands in it
FORMATS = ("table", "markdown", "csv", "json")
# One space between columns: what a row has to say fits 100 columns.
_TIGHT = TableFormat(
    lineabove=None, linebelowheader=None, linebetweenrows=None, linebelow=None,
    headerrow=DataRow("", " ", ""), datarow=DataRow("", " ", ""), padding=0, with_header_hide=None,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its head, the text of a cell, whether a narrow terminal may do without it, and then says so."""

    head: str
    text: Callable[[Result], str]
    optional: bool = False
    missed: bool = True


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.4g}"


def _spread(result: Result) -> str:
    return "" if result.ms is None else f"{_milliseconds(result.ms.p20)}-{_milliseconds(result.ms.p80)}"


def _speedup(gain: Speedup | None) -> str:
    if gain is None:
        return ""
    return f"{gain.ratio:.2f}x \N{PLUS-MINUS SIGN}{(gain.high - gain.low) / 2:.2f} {gain.verdict}"


def _error(result: Result) -> str:
    if not result.error or result.error.get("max") is None:
        return ""
    return f"{result.error['max']:.0e} {result.error['rms']:.0e}"


COLUMNS = (
    Column("backend", lambda r: r.backend),
    Column("class", lambda r: r.problem.precision or ""),
    Column("status", lambda r: r.status),
    Column("ms", lambda r: _milliseconds(r.ms.median if r.ms else None)),
    Column("p20-p80", _spread, optional=True),
    Column("TFLOP/s", lambda r: "" if r.tflops is None else f"{r.tflops:.3g}" if r.tflops < 100 else f"{r.tflops:.0f}"),
    Column("peak", lambda r: "" if r.peak_fraction is None else f"{100 * r.peak_fraction:.0f}%"),
    Column("speed-up", lambda r: _speedup(r.speedup)),
    Column("max rms error", _error, optional=True),
    Column("MiB", lambda r: "" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f}", optional=True),
    Column("graph ms", lambda r: _milliseconds(r.graph_ms), optional=True),
    Column("first call s", lambda r: f"{r.build_ms / 1e3:.2g}" if r.build_ms else "", optional=True, missed=False),
)


def heading(result: Result) -> str:
    """The problem of a block of rows, in one line."""
    return f"{result.problem.shape_key()}  {result.problem.dtype}  {result.problem.pass_}"


def block(results: Sequence[Result], width: int) -> str:
    """The rows of one problem for a terminal of `width` columns: heading, table, and why rows are not ok.

    Columns that do not fit are left out, those that a reader needs least first; those that would be missed are named."""
    columns = [c for c in COLUMNS if any(c.text(r) for r in results)]
    hidden: list[str] = []
    table = _table(columns, results)
    for column in reversed(COLUMNS):
        if max(map(len, table.splitlines())) <= width:
            break
        if column.optional and column in columns:
            columns.remove(column)
            hidden[:0] = [column.head] if column.missed else []
            table = _table(columns, results)
    base = next((r.speedup.baseline for r in results if r.speedup), None)
    head = heading(results[0]) + (f"   (speed-up: against {base})" if base else "")
    notes = [f"  {r.backend} {r.problem.precision}: {r.status}: {r.reason}" for r in results if r.status != "ok"]
    if hidden:
        notes.append(f"  (no room for: {', '.join(hidden)}; --format csv has them)")
    wrapped = [textwrap.fill(note, width, subsequent_indent="    ", break_long_words=False) for note in notes]
    return "\n".join([head, table, *wrapped, ""])


def _table(columns: Sequence[Column], results: Sequence[Result]) -> str:
    rows = [[c.text(r) for c in columns] for r in results]
    align = ["left" if c.head in ("backend", "class", "status", "speed-up") else "right" for c in columns]
    return tabulate(rows, [c.head for c in columns], tablefmt=_TIGHT, colalign=align, disable_numparse=True)


def markdown(results: Sequence[Result]) -> str:
    """Every row with every column, as one Markdown table."""
    columns = [Column("problem", heading), *(c for c in COLUMNS if any(c.text(r) for r in results))]
    rows = [[c.text(r) for c in columns] for r in results]
    return tabulate(rows, [c.head for c in columns], tablefmt="pipe", disable_numparse=True)


CSV_HEAD = (
    "backend", "problem", "dtype", "precision", "pass", "status", "reason", "ms", "p20", "p80", "tflops",
    "peak_fraction", "peak_tflops", "baseline", "speedup", "low", "high", "verdict", "error_max", "error_rms",
    "error_worst_row", "host_us", "graph_ms", "build_ms", "peak_bytes",
)  # fmt: skip


def csv_rows(results: Iterable[Result], *, head: bool) -> str:
    """Comma-separated rows, with or without the header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if head:
        writer.writerow(CSV_HEAD)
    for r in results:
        p, ms, gain, error = r.problem, r.ms, r.speedup, r.error or {}
        writer.writerow([
            r.backend, p.shape_key(), p.dtype, p.precision, p.pass_, r.status, r.reason,
            *((ms.median, ms.p20, ms.p80) if ms else ("", "", "")), r.tflops, r.peak_fraction,
            r.peak["tflops"] if r.peak else "",
            *((gain.baseline, gain.ratio, gain.low, gain.high, gain.verdict) if gain else [""] * 5),
            error.get("max"), error.get("rms"), error.get("worst_row"), r.host_us, r.graph_ms, r.build_ms, r.peak_bytes,
        ])  # fmt: skip
    return text.getvalue()


class Printer:
    """Writes groups of results to stdout as they are measured, in one of FORMATS."""

    def __init__(self, form: str) -> None:
        self.form, self.count = form, 0
        # 100 columns where nobody says how wide a line may be
        self.width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100

    @staticmethod
    def write(text: str) -> None:
        """To stdout, now."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def group(self, results: Sequence[Result]) -> None:
        """One problem's rows."""
        if self.form == "table":
            self.write(block(results, self.width) + "\n")
        elif self.form == "csv":
            self.write(csv_rows(results, head=not self.count))
        elif self.form == "json":
            lines = (json.dumps(r.to_record(), allow_nan=False) for r in results)
            self.write(("[\n" if not self.count else ",\n") + ",\n".join(lines))
        else:
            self.write(markdown(results) + "\n\n")
        self.count += len(results)

    def end(self) -> None:
        """Close what is open."""
        if self.form == "json":
            self.write("\n]\n" if self.count else "[]\n")


def groups(results: Iterable[Result]) -> list[list[Result]]:
    """Results of the same problem but for the precision, together, in order of first appearance."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(heading(result), []).append(result)
    return list(found.values())


# --- pages ----------------------------------------------------------------------------------------


def pivots(results: Sequence[Result]) -> str:
    """TFLOP/s by sequence length, a Markdown table for each family of problems that differ in it only. Rows of one
    class stand together: they are what may be compared."""
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(_family(result), []).append(result)
    parts = []
    for family, members in families.items():
        lengths = sorted({r.problem.seq_q for r in members})
        classes = PRECISIONS[members[0].problem.dtype]
        rows: dict[tuple[str, str], dict[int, str]] = {}
        for r in members:
            cell = f"{r.tflops:.3g}" if r.tflops is not None else r.status
            rows.setdefault((r.backend, r.problem.precision or ""), {})[r.problem.seq_q] = cell
        lines = [
            [backend, precision, *(cells.get(n, "") for n in lengths)]
            for (backend, precision), cells in sorted(rows.items(), key=lambda row: classes.index(row[0][1]))
            if any(re.match(r"[\d.]", cell) or cell not in ("unsupported", "unavailable") for cell in cells.values())
        ]
        table = tabulate(lines, ["backend", "class", *map(str, lengths)], tablefmt="pipe", disable_numparse=True)
        parts.append(f"**{family}**, TFLOP/s at seq =\n\n{table}\n")
    return "\n".join(parts)


OTHERS = ("sdpa-cudnn", "sdpa-flash", "flex", "fa2", "fa3", "fa4")  # people's kernels that ours are held against


def ratios(results: Iterable[Result]) -> str:
    """How many times as fast as other people's kernels, and as the best of them in each cell, every other backend is: a
    Markdown table of geometric means over the cells that both have, the worst cell in brackets. A line a pass and class."""
    cells: dict[tuple, dict[str, float]] = {}
    for r in results:
        if r.tflops is not None and r.status == "ok":
            cells.setdefault((r.problem.pass_, r.problem.precision, r.problem), {})[r.backend] = r.tflops
    found: dict[tuple, dict[str, list[float]]] = {}
    for (pass_, precision, _), cell in cells.items():
        others = {name: speed for name, speed in cell.items() if name in OTHERS}
        against = others | ({"the best": max(others.values())} if others else {})
        for name in cell.keys() - others.keys():
            for other, speed in against.items():
                row = found.setdefault((pass_, precision, name), {})
                row.setdefault(other, []).append(cell[name] / speed)
    columns = [other for other in (*OTHERS, "the best") if any(other in row for row in found.values())]
    lines = [
        [*kind, len(row["the best"]), *(_mean(row[other]) if other in row else "" for other in columns)]
        for kind, row in sorted(found.items(), key=lambda item: (item[0][0] != "fwd", item[0]))
    ]
    head = ["pass", "class", "backend", "cells", *columns]
    return tabulate(lines, head, tablefmt="pipe", disable_numparse=True) + "\n"


def _mean(gains: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(gains):.2f} ({min(gains):.2f})"


def _family(result: Result) -> str:
    p = result.problem
    parts = [f"heads {p.heads_q}" + (f"/{p.heads_kv}" if p.heads_kv != p.heads_q else ""), f"head_dim {p.head_dim}"]
    parts += ["causal"] if p.causal else ["full"]
    parts += [part for part in p.shape_key().split("-") if re.match(r"w\d*:|cap|alibi|scale", part)]
    return f"{p.dtype} {p.pass_}, {', '.join(parts)}"


def page(path: Path) -> str:
    """The Markdown page of a results file: what it was measured on, pivots, every row."""
    if runs.holds_runs(path):
        return runs.page(path, _shown)
    results = list(latest(read_results(path)).values())
    environments = {json.dumps(_shown(r.environment), sort_keys=True): _shown(r.environment) for r in results}
    lines = [f"# {path.stem}", "", f"Generated from [{path.name}]({path.name}) by `bench.py report --write`.", ""]
    for environment in environments.values():
        lines += ["- " + ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)]
    lines += ["", pivots(results), "## Every cell", "", markdown(results), ""]
    if refused := [r for r in results if r.status != "ok"]:
        reasons = dict.fromkeys(f"- {r.backend}, {r.problem.key()}: {r.status}: {r.reason}" for r in refused)
        lines += ["## Why not", "", *reasons, ""]
    return "\n".join(lines)


def _shown(environment: dict) -> dict:
    shown = {key: value for key, value in environment.items() if key not in ("time", "ceilings")}
    if ceilings := environment.get("ceilings"):
        shown["matmul TFLOP/s"] = "/".join(f"{name} {value:.3g}" for name, value in ceilings.items())
    return shown


_MARKED = re.compile(
    r"(<!-- (?P<what>table|ratios|sample|ways|speeds): (?P<paths>\S+( \S+)*) -->\n).*?(?P<end><!-- /(?P=what) -->)",
    re.DOTALL,
)


def fill_tables(document: Path) -> str:
    """The text of a Markdown file with each `<!-- table: FILE.jsonl -->` ... `<!-- /table -->` made anew: pivots, or
    the rows of training runs; `<!-- sample: ... -->` is the text that the last run wrote. `<!-- ratios: ... -->` takes
    several files. So do `<!-- ways: ... -->` and `<!-- speeds: ... -->`, of which some may not be there yet: they are
    core.ways's tables.

    Paths are relative to the document."""

    def fill(match: re.Match[str]) -> str:
        files = [document.parent / path for path in match["paths"].split()]
        source = files[0]
        if match["what"] == "ways":
            text = ways.overview(files)
        elif match["what"] == "speeds":
            text = ways.speeds(files, document.parent)
        elif match["what"] == "ratios":
            text = ratios(result for file in files for result in latest(read_results(file)).values())
        elif match["what"] == "sample":
            text = runs.sample_block([run for run in runs.read_runs(source) if run.sample][-1]) + "\n"
        elif runs.holds_runs(source):
            text = runs.table(runs.read_runs(source), "markdown") + "\n"
        else:
            text = pivots(list(latest(read_results(source)).values()))
        return f"{match[1]}\n{text}\n{match['end']}"

    return _MARKED.sub(fill, document.read_text())


def generated(files: Iterable[Path], documents: Iterable[Path]) -> dict[Path, str]:
    """Every file that `report --write` would write, with its text."""
    pages = {path.with_suffix(".md"): page(path) for path in files}
    return pages | {document: fill_tables(document) for document in documents}


# --- two files against each other ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One cell in two files: `gain` is old time / new time, None where either has no time."""

    old: Result
    new: Result
    gain: Speedup | None

    def regressed(self, tolerance: float) -> bool:
        """Slower beyond doubt by more than `tolerance`, or no longer ok."""
        if self.gain is None:
            return self.old.status == "ok"
        return self.gain.high < 1 and self.gain.ratio < 1 - tolerance


def changes(old: Iterable[Result], new: Iterable[Result]) -> list[Change]:
    """The cells that both files have."""
    before = latest(old)
    found = []
    for key, result in latest(new).items():
        if earlier := before.get(key):
            both = earlier.rounds and result.rounds and earlier.status == result.status == "ok"
            gain = speedup("before", earlier.rounds, result.rounds, paired=False) if both else None
            found.append(Change(earlier, result, gain))
    return found


def change_table(found: Sequence[Change]) -> str:
    """One line a cell: both times, their ratio, the verdict."""
    rows = [
        [
            c.new.backend, heading(c.new), c.new.problem.precision,
            _milliseconds(c.old.ms.median) if c.old.ms else c.old.status,
            _milliseconds(c.new.ms.median) if c.new.ms else c.new.status, _speedup(c.gain),
        ]
        for c in found
    ]  # fmt: skip
    return tabulate(
        rows, ["backend", "problem", "class", "ms before", "ms now", "speed-up"], tablefmt=_TIGHT, disable_numparse=True
    )
