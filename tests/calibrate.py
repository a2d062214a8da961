"""Measure what honest kernels need of the judge's constants, and what they must not be given.

    python tests/calibrate.py --device cuda --out calibration.jsonl

Every installed backend that supports the problem is judged on a grid of problems. A row holds the smallest (a, b, c)
of rule T that would have accepted it; `floor` and `eps` are as in core/judge.py. `less exact` rows are the emulation
of a cheaper class passed off as the row's class: the constants must lie between the two kinds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
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
    """One row for each backend, problem, distribution, seed and output tensor."""
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
        for distribution, seed in itertools.product(DISTRIBUTIONS, range(seeds)):
            inputs = make_inputs(problem, distribution=distribution, seed=seed, device=device)
            judge = Judge(problem, inputs, flops=2e11 if device == "cuda" else None)
            key = {"problem": problem.to_dict(), "distribution": distribution, "seed": seed}
            for name, backend in supported:
                try:
                    with _tf32(problem.precision == "tf32"):
                        outputs = outputs_of(backend, problem, inputs)
                except (RuntimeError, NotImplementedError) as error:  # a row, so that one kernel ends nothing
                    yield {**key, "backend": name, "tensor": "", "wrong": f"raised {type(error).__name__}: {error}"}
                    continue
                yield from _rows({**key, "backend": name}, judge.check(outputs, problem.precision))
            for less in cheaper:
                i = inputs
                options = {"causal": problem.causal, "softcap": problem.softcap, "scale": problem.scale}
                outputs = emulate(i.q, i.k, i.v, i.do, precision=less, **options)
                yield from _rows({**key, "backend": f"less exact: {less}"}, judge.check(outputs, problem.precision))


def _rows(key: dict[str, Any], verdict: Verdict) -> Iterator[dict[str, Any]]:
    if not verdict.per_tensor:
        yield {**key, "tensor": "", "wrong": verdict.reason}
    for tensor, report in verdict.per_tensor.items():
        budget = BUDGETS[key["problem"]["precision"]][tensor in BACKWARD]
        needs = [share * constant for share, constant in zip(report.used, (budget.a, budget.b, budget.c), strict=True)]
        relative = {"relative": report.relative, "worst_row": report.worst_row}
        yield {**key, "tensor": tensor, "needs": needs, "wrong": report.wrong, **relative}


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown, per class, backend, pass and length: the largest (a, b, c) needed, and how many cases were rejected.
    For a cheaper class passed off as the row's, the smallest: of each case the rule and tensor that shows it best."""
    cases: dict[tuple, dict[tuple, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["tensor"] in ("o", *BACKWARD):
            pass_ = "bwd" if row["tensor"] in BACKWARD else "fwd"
            # A few rows are decided by luck, so short problems are told apart.
            length = "< 64" if row["problem"]["seq_q"] < 64 else ">= 64"
            kind = (row["problem"]["precision"], row["backend"], pass_, length)
            case = (json.dumps(row["problem"], sort_keys=True), row["distribution"], row["seed"])
            cases.setdefault(kind, {}).setdefault(case, []).append(row)
    lines = [
        "| class | backend | pass | seq | a | b | c | relative rms | rejected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, members in sorted(cases.items()):
        pick = min if kind[1].startswith("less") else max
        needs = [pick(max(row["needs"][n] for row in case) for case in members.values()) for n in range(3)]
        relative = statistics.median(max(row["relative"] for row in case) for case in members.values())
        rejected = sum(any(row["wrong"] for row in case) for case in members.values())
        figures = [*(f"{x:.2f}" for x in needs), f"{relative:.1e}", f"{rejected} of {len(members)}"]
        lines.append("| " + " | ".join([*kind, *figures]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=sorted(SEQS))
    parser.add_argument("--dtypes", default="fp32,fp16,bf16")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append every row to this JSONL file")
    args = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(args.out.open("a")) if args.out else None
        for row in calibrate(args.device, tuple(args.dtypes.split(",")), args.seeds, tuple(args.backends.split(","))):
            rows.append(row)
            if file:
                file.write(json.dumps(row) + "\n")
    for row in rows:
        if row["wrong"] and not row["wrong"].startswith("breaks"):
            print(row["backend"], row["problem"], row["distribution"], row["tensor"], row["wrong"])
    print(summary(rows))


if __name__ == "__main__":
    main()
