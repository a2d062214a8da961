"""Compare attention backends: is each one correct, and how fast is it, on your shapes and your machine?

Usage:
    python bench.py                                         a sensible default for the machine found
    python bench.py --backends naive,sdpa --seqlen 1k,4k    your own
    python bench.py train --backends sdpa,triton            the same small model on each: step time and loss
    python bench.py list | explain | report | compare | doctor
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a script: this checkout is the package, installed or not
    import importlib.util

    _root = Path(__file__).resolve().parent
    _spec = importlib.util.spec_from_file_location(
        "flash2", _root / "__init__.py", submodule_search_locations=[str(_root)]
    )
    assert _spec is not None and _spec.loader is not None  # a .py file always has a loader
    sys.modules["flash2"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["flash2"])

from flash2.backends import list_backends
from flash2.core import plan

RESOLVE = "flash2.backends:get_backend"
BAD_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and leave with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (--help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "list": list_, "explain": explain, "report": report, "compare": compare, "doctor": doctor, "train": train
    }  # fmt: skip
    command = commands[words.pop(0)] if words and words[0] in commands else run
    try:
        return command(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our table left; so do we
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def problem_parser(prog: str, description: str) -> Parser:
    """A parser with every option of plan.OPTIONS; those not given stay absent."""
    parser = Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for name, option in plan.OPTIONS.items():
        extra: dict[str, Any] = {"nargs": "?", "const": "yes"} if option.flag else {}
        default = f" (default: {option.default})" if option.default is not None else ""
        parser.add_argument(f"--{name}", metavar=option.metavar, help=option.help + default, **extra)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line wins")
    return parser


def chosen_options(parser: Parser, given: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(command line, config file), every value already read once so that a bad one is refused here."""
    with bad_input(parser):
        config = plan.read_config(given.pop("config")) if "config" in given else {}
        given = {name.replace("_", "-"): text for name, text in given.items()}
        for name, text in given.items():
            plan.parse_option(name, text)
    return given, config


@contextlib.contextmanager
def bad_input(parser: Parser) -> Iterator[None]:
    """What the user gave and cannot be is one line and exit code 2."""
    try:
        yield
    except OSError as error:
        parser.error(f"{error.filename or 'file'}: {error.strerror or error}")
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def known_backends(parser: Parser, names: Sequence[str]) -> None:
    """Refuse, before anything starts, a name that nothing can be found under."""
    for name in names:
        file, colon, _ = name.rpartition(":")
        if name not in list_backends() and not (colon and file.endswith(".py") and Path(file).is_file()):
            if colon and file.endswith(".py"):
                parser.error(f"backend {name!r}: no file {file}")
            parser.error(f"unknown backend {name!r}; known: {', '.join(list_backends())}, or ./file.py:Class")


def run(words: list[str]) -> int:
    """The sweep."""
    parser = problem_parser("bench.py", __doc__ or "")
    form = parser.add_argument_group("output")
    form.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="(default: table)"
    )
    form.add_argument("--out", metavar="FILE.jsonl", help="append results here (default: the last run's own file)")
    form.add_argument("--resume", action="store_true", default=False, help="skip cells that the file already has")
    form.add_argument("--print-config", action="store_true", default=False, help="print the options in force and stop")
    form.add_argument("--dry-run", action="store_true", default=False, help="print the cells that would run and stop")
    parsed = vars(parser.parse_args(words))
    own = {name: parsed.pop(name, None) for name in ("format", "out", "resume", "print_config", "dry_run")}
    given, config = chosen_options(parser, parsed)
    if "backends" in {**config, **given}:
        known_backends(parser, plan.words({**config, **given}["backends"]))
    if "baseline" in {**config, **given}:
        known_backends(parser, [{**config, **given}["baseline"]])
    with bad_input(parser):
        for device_type in ("cpu", "cuda"):  # contradictions are found before a worker starts
            plan.problems(plan.effective(given, config, device_type))
    from flash2.core.session import Session  # the harness; --help does without

    session = Session(given=given, config=config, resolve=RESOLVE, **own)
    with bad_input(parser):
        return session.run()


def list_(words: list[str]) -> int:
    """The backends there are."""
    parser = Parser(prog="bench.py list", description="Backends, their versions, and why one is unavailable.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    device = parser.parse_args(words).device
    from flash2.core.session import list_table

    print(list_table(list_backends(), RESOLVE, device))
    return 0


def explain(words: list[str]) -> int:
    """Who can run a problem, and why the others cannot."""
    parser = problem_parser("bench.py explain", "Who can run these problems, why the others cannot, what is nearest.")
    given, config = chosen_options(parser, vars(parser.parse_args(words)))
    names = plan.words({**config, **given}["backends"]) if "backends" in {**config, **given} else list_backends()
    known_backends(parser, names)
    from flash2.core.session import explanation

    with bad_input(parser):
        print(explanation(names, given, config, RESOLVE))
    return 0


def report(words: list[str]) -> int:
    """Tables of finished results."""
    parser = Parser(prog="bench.py report", description="Tables from results files, and the pages under docs/results.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--format", choices=("table", "markdown", "csv", "json"), default="table")
    parser.add_argument(
        "--into", type=Path, action="append", default=[], metavar="DOC.md", help="fill its table markers"
    )
    parser.add_argument("--write", action="store_true", help="write a page beside each file, and fill the documents")
    parser.add_argument("--check", action="store_true", help="exit 1 if --write would change anything")
    asked = parser.parse_args(words)
    from flash2.core.report import Printer, generated, groups
    from flash2.core.results import read_results
    from flash2.core.training import runs

    with bad_input(parser):
        if asked.write or asked.check:
            stale = [(p, text) for p, text in generated(asked.files, asked.into).items() if not _holds(p, text)]
            for path, text in stale:
                print(f"{'stale' if asked.check else 'wrote'} {path}")
                if not asked.check:
                    path.write_text(text)
            return 1 if asked.check and stale else 0
        printer = Printer(asked.format)
        cells, trained = [], []
        for path in asked.files:
            (trained if runs.holds_runs(path) else cells).append(path)
        for path in trained:
            print(runs.table(runs.read_runs(path), asked.format))
        for path in cells:
            for group in groups(read_results(path)):
                printer.group(group)
        if cells or not trained:
            printer.end()
    return 0


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def compare(words: list[str]) -> int:
    """Two results files, cell by cell."""
    parser = Parser(prog="bench.py compare", description="Is each cell of NEW faster or slower than in OLD?")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--fail-on-regression", metavar="5%", help="exit 1 if a cell is slower by more, or no longer ok"
    )
    asked = parser.parse_args(words)
    from flash2.core.report import change_table, changes
    from flash2.core.results import read_results

    with bad_input(parser):
        limit = asked.fail_on_regression
        tolerance = plan.number(0, 100)(limit.removesuffix("%")) / 100 if limit else None
        found = changes(read_results(asked.old), read_results(asked.new))
        if not found:
            raise ValueError(f"{asked.old} and {asked.new} have no cell in common")
    print(change_table(found))
    worse = [c for c in found if tolerance is not None and c.regressed(tolerance)]
    if worse:
        print(f"{len(worse)} of {len(found)} cells regressed by more than {limit}")
    return 1 if worse else 0


def train(words: list[str]) -> int:
    """The same small model trained on each backend."""
    parser = Parser(prog="bench.py train", description="Step time, memory and loss of one model on each backend.")
    parser.add_argument("--backends", metavar="A,B", help="by name or ./file.py:Class (default: the machine's)")
    parser.add_argument(
        "--seeds", metavar="N,..", help="sdpa also trains with those after the first: the spread of runs"
    )
    from flash2.core.training import runs, session

    session.add_arguments(parser)
    asked = parser.parse_args(words)
    with bad_input(parser):
        names = plan.words(asked.backends) if asked.backends else []
        known_backends(parser, names)
        seeds = [plan.integer(text) for text in plan.words(asked.seeds)] if asked.seeds else []
        found = session.from_arguments(asked, names, seeds).run()
        print(runs.table(found, asked.format))
        if asked.plot:  # with what --out holds of the same work from before
            kept = [run for run in runs.read_runs(asked.out) if runs.same_work(run, found[0])] if asked.out else found
            runs.picture(kept, asked.plot)
    return 0 if any(run.status == "ok" for run in found) else 1


def doctor(words: list[str]) -> int:
    """What this machine has, lacks, and needs."""
    parser = Parser(prog="bench.py doctor", description="What this machine has for the backends, and what to install.")
    parser.parse_args(words)
    from flash2.core.session import doctor_table

    print(doctor_table(list_backends(), RESOLVE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
