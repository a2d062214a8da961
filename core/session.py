"""What the command line does with a worker: run a plan and print it, list, explain, doctor. No torch here."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from flash2.core import plan
from flash2.core.problem import PRECISIONS, Problem
from flash2.core.report import Printer
from flash2.core.results import Result, ResultFile, read_results
from flash2.core.sweep import Sweep

Cells = list[tuple[str, str]]


def state_dir() -> Path:
    """Where the last run's results are kept unless --out names a file (XDG base directories)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "flash2"


@dataclass(slots=True, kw_only=True)
class Session:
    """One `bench.py` run: options as text, where the results go, how they are shown."""

    given: dict[str, str]
    config: dict[str, str]
    resolve: str
    format: str = "table"
    out: str | None = None
    resume: bool = False
    print_config: bool = False
    dry_run: bool = False

    def run(self) -> int:
        """Plan, measure, print; 0, or 130 after Ctrl-C. ValueError and OSError are the user's to mend."""
        path = Path(self.out) if self.out else state_dir() / "last.jsonl"
        done = read_results(path) if self.resume and path.exists() else []
        sweep = self._sweep()
        try:
            device, texts, backends = self._options(sweep)
            if self.print_config:
                sys.stdout.write(plan.to_toml(texts))
                return 0
            baseline = self._baseline(texts, backends)
            groups = self._groups(texts, backends, baseline)
            if self.dry_run:
                return self._print_plan(groups, device)
            if not self.out and not self.resume and path.exists():
                path.replace(path.with_name("previous.jsonl"))
            return self._measure(sweep, groups, baseline, ResultFile(path), done)
        except KeyboardInterrupt:
            sweep.close(at_once=True)
            sys.stderr.write(f"\ninterrupted; finished cells are in {path}, go on with --resume\n")
            return 130
        finally:
            sweep.close()

    def _sweep(self) -> Sweep:
        option = plan.with_defaults(self.config | self.given)
        get = {n: plan.parse_option(n, option[n]) for n in ("device", "seed", "timeout", "seconds", "graph", "cold")}
        return Sweep(resolve=self.resolve, **get)

    def _options(self, sweep: Sweep) -> tuple[str, dict[str, str], dict[str, dict[str, Any]]]:
        chosen = self.config | self.given
        names = plan.words(chosen["backends"]) if "backends" in chosen else []
        if "baseline" in chosen:
            names = [*names, chosen["baseline"]] if names else names
        every = names or sorted(set(itertools.chain(*map(plan.words, plan.MACHINE_BACKENDS.values()))))
        device, found = sweep.hello(list(dict.fromkeys(every)))
        texts = plan.effective(self.given, self.config, device.partition(":")[0])
        wanted = plan.words(texts["backends"]) + ([chosen["baseline"]] if "baseline" in chosen else [])
        return device, texts, {name: found[name] for name in dict.fromkeys(wanted)}

    def _baseline(self, texts: dict[str, str], backends: dict[str, Any]) -> str:
        if "baseline" in texts:
            return texts["baseline"]
        return "sdpa" if "sdpa" in backends else next(iter(backends))

    def _groups(self, texts: dict[str, str], backends: dict[str, Any], baseline: str) -> list[tuple[Problem, Cells]]:
        classes = {name: found["classes"] for name, found in backends.items()}
        wanted = plan.parse_option("precision", texts["precision"])
        groups = []
        for problem in plan.problems(texts):
            cells = plan.cells(problem, wanted, classes)
            cells.sort(key=lambda cell: cell[0] != baseline)  # the baseline's row comes first
            if cells:
                groups.append((problem, cells))
        if not groups:
            raise ValueError(f"precision {texts['precision']} is no class of dtype {texts['dtype']}")
        return groups

    def _print_plan(self, groups: list[tuple[Problem, Cells]], device: str) -> int:
        for problem, cells in groups:
            print(
                f"{problem.shape_key()}  {problem.dtype}  {problem.pass_}:", ", ".join(f"{b} ({c})" for b, c in cells)
            )
        print(f"{sum(len(cells) for _, cells in groups)} cells on {device}")
        return 0

    def _measure(
        self, sweep: Sweep, groups: list[tuple[Problem, Cells]], baseline: str, file: ResultFile, done: list[Result]
    ) -> int:
        printer, setting = Printer(self.format), sweep.fingerprint()
        finished = {r.key: r for r in done}
        total = sum(len(cells) for _, cells in groups)
        bar = tqdm(total=total, unit="cell", file=sys.stderr, disable=None, dynamic_ncols=True, leave=False)
        sweep.on_stage = lambda backend, precision, stage: bar.set_postfix_str(f"{backend} {precision}: {stage}")
        try:
            for problem, cells in groups:
                bar.set_description_str(problem.shape_key())
                keys = {cell: (cell[0], problem.replace(precision=cell[1]).key(), setting) for cell in cells}
                missing = [cell for cell in cells if keys[cell] not in finished]
                classes = {precision for _, precision in missing}
                again = [cell for cell in cells if cell in missing or (cell[0] == baseline and cell[1] in classes)]
                fresh = sweep.run_group(problem, again, baseline) if missing else []
                finished |= {result.key: result for result in fresh}
                try:
                    for result in fresh:
                        file.append(result)
                finally:  # a full disk keeps nobody from seeing what was measured
                    with bar.external_write_mode(file=sys.stdout):
                        printer.group([finished[keys[cell]] for cell in cells])
                bar.update(len(cells))
        finally:
            bar.close()
            printer.end()
            file.close()
        sys.stderr.write(f"results: {file.path}\n")
        return 0


def list_table(names: Sequence[str], resolve: str, device: str) -> str:
    """Name, version, classes of each backend, and why one is unavailable."""
    sweep = Sweep(resolve=resolve, device=device)
    try:
        where, found = sweep.hello(list(names))
    finally:
        sweep.close()
    rows = []
    for name in names:
        entry = found[name]
        classes = " ".join(dict.fromkeys(itertools.chain(*entry["classes"].values())))
        rows.append([name, entry["version"], classes, entry["unavailable"] or "ready"])
    return f"device: {where}\n" + tabulate(
        rows, ["backend", "version", "classes", "state"], maxcolwidths=[None, 24, 28, 50]
    )


def explanation(names: Sequence[str], given: dict[str, str], config: dict[str, str], resolve: str) -> str:
    """For each problem of the options: who can run it, and of the others every reason and the nearest problem they can."""
    sweep = Sweep(resolve=resolve, device=plan.with_defaults(config | given)["device"])
    try:
        device, found = sweep.hello(list(names))
        texts = plan.effective(given, config, device.partition(":")[0])
        parts = []
        for problem in plan.problems(texts):
            for precision in _asked_classes(texts, problem, found):
                asked = problem.replace(precision=precision)
                parts.append(_explain(asked, sweep.why_not(list(names), asked)))
        return "\n".join(parts)
    finally:
        sweep.close()


def _asked_classes(texts: dict[str, str], problem: Problem, found: dict[str, Any]) -> list[str]:
    wanted = plan.parse_option("precision", texts["precision"])
    if "all" in wanted:
        return list(PRECISIONS[problem.dtype])
    cells = plan.cells(problem, wanted, {name: entry["classes"] for name, entry in found.items()})
    return list(dict.fromkeys(precision for _, precision in cells))


def _explain(problem: Problem, answers: list[dict[str, Any]]) -> str:
    able = [a["name"] for a in answers if not a["unavailable"] and not a["reasons"]]
    lines = [problem.key(), f"  can run it: {', '.join(able) or 'none of them'}"]
    for answer in answers:
        if answer["name"] in able:
            lines += [f"  {answer['name']}: {line}" for line in answer["details"]]
            continue
        reasons = ([f"unavailable: {answer['unavailable']}"] if answer["unavailable"] else []) + answer["reasons"]
        lines.append(f"  {answer['name']}: {'; '.join(reasons)}")
        if answer["nearest"]:
            lines.append(f"    nearest it can: {Problem.from_dict(answer['nearest']).key()}")
    return "\n".join(lines) + "\n"


def doctor_table(names: Sequence[str], resolve: str) -> str:
    """What is there, what is not, and what to do about it."""
    sweep = Sweep(resolve=resolve)
    try:
        rows = [[r["check"], r["found"], r["remedy"]] for r in sweep.doctor()]
        _, found = sweep.hello(list(names))
    finally:
        sweep.close()
    rows += [
        [f"backend {name}", "ready" if not e["unavailable"] else "unavailable", e["unavailable"] or ""]
        for name, e in found.items()
    ]
    return tabulate(rows, ["check", "found", "what to do"], maxcolwidths=[None, 40, 60])
