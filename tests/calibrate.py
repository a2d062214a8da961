"""Measure what honest kernels need of the judge's constants, and what they must not be given.

    python tests/calibrate.py --device cuda --out calibration.jsonl
    python tests/calibrate.py --from calibration.jsonl

Every installed backend that supports the problem is judged on a grid of problems. For each case, a distribution and a
seed, a row holds the smallest (a, b, c) of rule T that would have accepted it and its relative rms error, the largest
over the tensors of a pass; or in words what no constant would have accepted. `floor` and `eps` are as in
core/judge.py. `less exact` rows are the emulation of a cheaper class passed off as the row's class: the constants must
lie between the two kinds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import flash2
from flash2.core.contract import Backend, spec_of
from flash2.core.functional import run
from flash2.core.inputs import Inputs, make_inputs
from flash2.core.judge import BACKWARD, BUDGETS, Judge, Verdict
from flash2.core.problem import PRECISIONS, Problem
from flash2.core.reference import emulate

# Independent kernels: the constants are not fitted to our own. FlexAttention compiles every shape: ask for it by name.
BACKENDS = ("naive", "sdpa-flash", "sdpa-math", "numba", "sdpa-cudnn", "sdpa-efficient")
DISTRIBUTIONS = ("randn", "half", "needle", "x3", "shifted")
# class -> the next cheaper one, which must not pass for it; fp16 and bf16 are compared with each other's rounding.
CHEAPER = {"ieee": ("bf16x3", "tf32"), "tf32x3": ("bf16x3", "tf32"), "bf16x6": ("bf16x3", "tf32"), "bf16x3": ("tf32",)}
TENSORS = {"fwd": ("o",), "bwd": BACKWARD}
SEQS = {"cpu": (1, 7, 64, 200, 512, 1024), "cuda": (1, 7, 64, 200, 1024, 4096)}


def outputs_of(backend: Backend, problem: Problem, inputs: Inputs) -> dict[str, torch.Tensor]:
    """o, lse where the backend has it, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    o, lse = run(backend, q, k, v, spec_of(problem, inputs.alibi_slopes), needs_grad=True)
    grads = torch.autograd.grad(o, (q, k, v), inputs.do)
    out = {"o": o.detach(), "lse": lse, **dict(zip(BACKWARD, grads, strict=True))}
    return {name: x for name, x in out.items() if x is not None}


def problems(device: str, dtypes: tuple[str, ...]) -> Iterator[Problem]:
    """The grid: every dtype and class, D 64 and 128, short and long, full and causal."""
    for dtype, dim, seq, causal in itertools.product(dtypes, (64, 128), SEQS[device], (False, True)):
        for precision in PRECISIONS[dtype]:
            shape = {"heads_q": 2 if device == "cpu" else 8, "seq_q": seq, "head_dim": dim, "causal": causal}
            yield Problem(**shape, dtype=dtype, precision=precision, pass_="fwd+bwd")


def calibrate(
    device: str,
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16"),
    seeds: int = 2,
    backends: tuple[str, ...] = BACKENDS,
) -> Iterator[dict[str, Any]]:
    """One row for each backend and problem."""
    shelf = []
    for name in backends:
        with contextlib.suppress(ImportError, ValueError):  # not on this machine, or not in this version
            backend = flash2.get_backend(name)
            if backend.unavailable() is None:
                shelf.append((name, backend))
    for problem in problems(device, dtypes):
        supported = []
        for name, backend in shelf:
            with _tf32(problem.precision == "tf32"):
                if not backend.why_not(problem, torch.device(device)):
                    supported.append((name, backend))
        cheaper = CHEAPER.get(problem.precision, ())
        if not supported:
            continue
        answers: dict[str, dict[str, Verdict | str]] = {}
        for distribution, seed in itertools.product(DISTRIBUTIONS, range(seeds)):
            i = make_inputs(problem, distribution=distribution, seed=seed, device=device)
            judge, case = Judge(problem, i, flops=2e11 if device == "cuda" else None), f"{distribution} {seed}"
            for name, backend in supported:
                try:
                    with _tf32(problem.precision == "tf32"):
                        answer = judge.check(outputs_of(backend, problem, i), problem.precision)
                except (RuntimeError, NotImplementedError) as error:  # an answer, so that one kernel ends nothing
                    answer = f"raised {type(error).__name__}: {error}"
                answers.setdefault(name, {})[case] = answer
            for less in cheaper:
                outputs = emulate(i.q, i.k, i.v, i.do, precision=less, causal=problem.causal)
                answers.setdefault(f"less exact: {less}", {})[case] = judge.check(outputs, problem.precision)
        for name, cases in answers.items():
            yield row_of(problem, name, cases)


def row_of(problem: Problem, backend: str, cases: dict[str, Verdict | str]) -> dict[str, Any]:
    """The JSON object of one line; `cases` are the judge's answers by name of the case, or what was raised instead."""
    needs = {pass_: {case: _needs(answer, problem, pass_) for case, answer in cases.items()} for pass_ in TENSORS}
    shape = {"heads": problem.heads_q, "head_dim": problem.head_dim, "seq": problem.seq_q, "causal": problem.causal}
    return {"class": problem.precision, "backend": backend, **shape, **needs}


def _needs(answer: Verdict | str, problem: Problem, pass_: str) -> list[float] | str:
    # [a, b, c, relative rms], the largest over the tensors of the pass; in words what is wrong without arithmetic.
    if isinstance(answer, str):
        return answer
    if not answer.per_tensor:
        return answer.reason
    budget = BUDGETS[problem.precision or ""][pass_ == "bwd"]
    found = []
    for tensor in TENSORS[pass_]:
        report = answer.per_tensor[tensor]
        shares = zip(report.used, (budget.a, budget.b, budget.c), strict=True)
        found.append([*(share * constant for share, constant in shares), report.relative])
        if not all(map(math.isfinite, found[-1])) or (report.wrong and not report.wrong.startswith("breaks T")):
            return f"{tensor} {report.wrong}"
    return [float(f"{max(figures):.5g}") for figures in zip(*found, strict=True)]


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def summary(rows: list[dict[str, Any]], *, less_exact: bool) -> str:
    """Markdown, per class, backend, pass and length: the largest (a, b, c) needed, and how many cases today's constants
    reject; or, of cheaper classes passed off as the row's (`less_exact`), the smallest."""
    kinds: dict[tuple[str, str, str, str], list[list[float] | str]] = {}
    for row in rows:
        if row["backend"].startswith("less exact") == less_exact:
            length = "< 64" if row["seq"] < 64 else ">= 64"  # a few rows are decided by luck
            for pass_ in TENSORS:
                kinds.setdefault((row["class"], row["backend"], pass_, length), []).extend(row[pass_].values())
    lines = [
        "| class | backend | pass | seq | a | b | c | median relative rms | rejected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, cases in sorted(kinds.items()):
        budget = BUDGETS[kind[0]][kind[2] == "bwd"]
        measured = [case for case in cases if not isinstance(case, str)]
        rejected = len(cases) - sum(a <= budget.a and b <= budget.b and c <= budget.c for a, b, c, _ in measured)
        figures = ["", "", "", ""]
        if measured:
            *needs, relative = zip(*measured, strict=True)
            figures = [*(f"{(min if less_exact else max)(x):.2f}" for x in needs), f"{statistics.median(relative):.1e}"]
        lines.append(f"| {' | '.join([*kind, *figures])} | {rejected} of {len(cases)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=sorted(SEQS))
    parser.add_argument("--dtypes", default="fp32,fp16,bf16")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append every row to this JSONL file")
    parser.add_argument("--from", type=Path, dest="source", help="measure nothing, show the tables of such a file")
    args = parser.parse_args()
    if args.source:
        rows = [json.loads(line) for line in args.source.read_text().splitlines()]
    else:
        rows = []
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(args.out.open("a")) if args.out else None
            dtypes, backends = args.dtypes.split(","), args.backends.split(",")
            for row in calibrate(args.device, tuple(dtypes), args.seeds, tuple(backends)):
                rows.append(row)
                if file:
                    file.write(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n")
                    file.flush()
    for row, pass_ in itertools.product(rows, TENSORS):
        shape = f"seq {row['seq']}, D {row['head_dim']}, {'causal' if row['causal'] else 'full'}"
        for case, needs in row[pass_].items():
            if isinstance(needs, str):
                print(f"{row['backend']} {row['class']} {pass_}, {shape}, {case}: {needs}")
    kinds = {row["backend"].startswith("less exact") for row in rows}
    print("\n\n".join(summary(rows, less_exact=less_exact) for less_exact in sorted(kinds)))


if __name__ == "__main__":
    main()
