"""The ways to write one kernel from Python, side by side: lines counted from the sources, times from results files.

The tables of docs/kernels-in-python.md; core.report puts them there. No torch.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from flash2.core.problem import PRECISIONS
from flash2.core.results import Result, latest, read_results

ROOT = Path(__file__).parent.parent
CLASSES = tuple(name for classes in PRECISIONS.values() for name in classes)
TOOLS = ("offline.py", "tune.py")  # nothing in them runs when attention is computed
JIT = re.compile(r"(?:\w+\.)?_?n?jit$|intrinsic$")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to write attention, the backend written so, and its sources relative to the package.

    eager: there are no kernels in them, the whole text is what they would be."""

    title: str
    backend: str
    sources: tuple[str, ...]
    eager: bool = False


WAYS = (
    Way("PyTorch", "naive", ("backends/naive.py",), eager=True),
    Way("Triton", "triton", ("backends/triton_fa2/*.py",)),
    Way("Gluon", "gluon", ("backends/gluon_hopper/*.py",)),
    Way("CUDA C++ through CuPy", "cupy", ("backends/cupy_cuda/*",)),
    Way("numba for CUDA", "numba-cuda", ("backends/numba_cuda*.py",)),
    Way("numba for the CPU", "numba", ("backends/numba_cpu.py", "backends/numba_kernels.py")),
)


def sources(way: Way) -> list[Path]:
    """The files that a call runs through."""
    found = sorted(path for pattern in way.sources for path in ROOT.glob(pattern))
    return [path for path in found if path.suffix in (".py", ".cu", ".cuh") and path.name not in TOOLS]


def lines(way: Way) -> tuple[int, int]:
    """(lines of files with kernels in them, lines of the files around them), without blanks, comments and docstrings."""
    kernels = around = 0
    for path in sources(way):
        text = path.read_text()
        count = python_lines(text) if path.suffix == ".py" else cuda_lines(text)
        if way.eager or path.suffix != ".py" or holds_kernels(text):
            kernels += count
        else:
            around += count
    return kernels, around


def holds_kernels(text: str) -> bool:
    """Whether some function in this Python source is compiled."""
    decorators = (
        decorator.func if isinstance(decorator, ast.Call) else decorator
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    )
    return any(JIT.match(ast.unparse(decorator)) for decorator in decorators)


def python_lines(text: str) -> int:
    """Lines of Python that hold code: no blanks, comments or docstrings."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in skipped
        for number, line in enumerate(text.splitlines(), 1)
    )


def cuda_lines(text: str) -> int:
    """Lines of CUDA C++ that hold code: no blanks or comments."""
    return sum(
        bool(re.sub(r"//.*", "", line).strip()) for line in re.sub(r"/\*.*?\*/", "", text, flags=re.S).split("\n")
    )


def first_call_seconds(results: Iterable[Result], backend: str, pass_: str) -> float | None:
    """What a first call took beyond a later one, the most of any cell; None where no run began with empty caches."""
    beyond = [
        (r.build_ms - r.ms.median) / 1e3
        for r in results
        if r.backend == backend and r.problem.pass_ == pass_ and r.environment.get("caches") == "empty"
        if r.build_ms is not None and r.ms is not None
    ]
    return max(beyond, default=None)


def read(files: Sequence[Path]) -> dict[Path, list[Result]]:
    """The last result of each cell in those of `files` that exist."""
    return {path: list(latest(read_results(path)).values()) for path in files if path.is_file()}


def overview(files: Sequence[Path]) -> str:
    """A row a way: lines of code, and the seconds of the first calls, from the first of `files` that has them."""
    found = read(files)
    rows = []
    for way in WAYS:
        seconds = []
        for pass_ in ("fwd", "bwd"):
            figures = (first_call_seconds(results, way.backend, pass_) for results in found.values())
            figure = next((figure for figure in figures if figure is not None), None)
            seconds.append("" if figure is None else f"{figure:.2g}")
        rows.append([way.title, f"`{way.backend}`", *(_about(n) for n in lines(way)), *seconds])
    head = ["way", "backend", "lines of kernels", "lines around them", "first forward, s", "first backward, s"]
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True) + "\n"


def _about(count: int) -> str:
    # Two digits say what there is to say, and stay while somebody mends a line.
    return f"{float(f'{count:.2g}'):.0f}" if count else ""


def speeds(files: Sequence[Path], folder: Path) -> str:
    """For each of `files` that exists one table: TFLOP/s forward / backward, a row a way, a column a class. Links are
    relative to `folder`."""
    parts = []
    for path, results in read(files).items():
        mine = [r for r in results if r.tflops is not None and r.backend in {way.backend for way in WAYS}]
        if not mine:
            continue
        # The problem that most ways were measured on, the largest of those.
        ways = Counter(shape for shape, _ in {(r.problem.shape_key(), r.backend) for r in mine})
        shape = max(ways, key=lambda s: (ways[s], max(r.problem.flops for r in mine if r.problem.shape_key() == s)))
        link = os.path.relpath(path.with_suffix(".md"), folder)
        parts.append(_speed_table(link, [r for r in mine if r.problem.shape_key() == shape]))
    return "\n".join(parts)


def _speed_table(link: str, results: Sequence[Result]) -> str:
    cells = {(r.backend, r.problem.precision, r.problem.pass_): f"{r.tflops:.3g}" for r in results}
    classes = [name for name in CLASSES if any(key[1] == name for key in cells)]
    rows = []
    for way in WAYS:
        row = [[cells.get((way.backend, name, pass_), "") for pass_ in ("fwd", "bwd")] for name in classes]
        if any(map(any, row)):
            rows.append([way.title, *(" / ".join(pair) if any(pair) else "" for pair in row)])
    table = tabulate(rows, ["way", *classes], tablefmt="pipe", disable_numparse=True)
    p, device = results[0].problem, results[0].environment.get("device")
    mask = "causal" if p.causal else "full"
    title = f"**{device}**, batch {p.batch}, heads {p.heads_q}, seq {p.seq_q}, head_dim {p.head_dim}, {mask}"
    return f"{title}: TFLOP/s forward / backward ([every cell]({link}))\n\n{table}\n"
