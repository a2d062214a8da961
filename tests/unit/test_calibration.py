"""docs/numerics.md shows what the calibration's rows say under today's constants."""

import json
import math
from pathlib import Path

import pytest
import torch
from calibrate import row_of, summary

import flash2
from flash2.core.inputs import make_inputs
from flash2.core.judge import BACKWARD, BUDGETS, Judge
from flash2.core.problem import Problem
from flash2.core.reference import emulate

DOCS = Path(flash2.__file__).parent / "docs"
PROBLEM = Problem(seq_q=64, head_dim=32, pass_="fwd+bwd")


def read(device):
    return [json.loads(line) for line in (DOCS / "calibration" / f"{device}.jsonl").read_text().splitlines()]


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("less_exact", [False, True])
def test_the_tables_are_what_the_rows_say(device, less_exact):
    table = summary(read(device), less_exact=less_exact)
    assert table in (DOCS / "numerics.md").read_text(), (
        f"python tests/calibrate.py --from docs/calibration/{device}.jsonl"
    )


@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_no_honest_kernel_breaks_a_constant(device):
    for row in read(device):
        for pass_ in ("fwd", "bwd"):
            budget = BUDGETS[row["class"]][pass_ == "bwd"]
            for case, needs in row[pass_].items():
                if not row["backend"].startswith("less exact") and isinstance(needs, list):
                    within = needs[0] <= budget.a and needs[1] <= budget.b and needs[2] <= budget.c
                    assert within, (row["backend"], row["class"], pass_, row["seq"], case, needs)


def test_a_row_has_what_the_judge_needed_and_in_words_what_no_constant_helps():
    inputs = make_inputs(PROBLEM)
    outputs = emulate(inputs.q, inputs.k, inputs.v, inputs.do, precision="bf16x3")
    judge = Judge(PROBLEM, inputs)
    verdict = judge.check(outputs, "ieee")
    broken = judge.check({**outputs, "dk": torch.full_like(outputs["dk"], math.nan)}, "ieee")
    row = row_of(PROBLEM, "x", {"randn 0": verdict, "nan 0": broken, "raised 0": "raised RuntimeError: no"})
    used = [verdict.per_tensor[name].used for name in BACKWARD]
    needs = [getattr(BUDGETS["ieee"][1], name) * max(x[n] for x in used) for n, name in enumerate("abc")]
    assert row["bwd"]["randn 0"][:3] == pytest.approx(needs, rel=1e-4) and row["fwd"]["nan 0"][0] > 0
    assert row["bwd"]["nan 0"].startswith("dk is nan at (0, 0, 0, 0)")
    assert row["bwd"]["raised 0"] == row["fwd"]["raised 0"] == "raised RuntimeError: no"
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert not verdict.ok and [line[-1] for line in cells(summary([row], less_exact=False))] == ["3 of 3", "3 of 3"]


def test_rejections_are_counted_with_todays_constants_and_the_extremes_shown():
    a, b, c = (getattr(BUDGETS["ieee"][0], name) for name in "abc")
    shape = {"class": "ieee", "heads": 1, "head_dim": 64, "seq": 64, "causal": False}
    cases = {
        "randn 0": [a, b, c, 1e-7],
        "half 0": [a + 0.01, 0.5, 0.5, 3e-7],
        "x3 0": "o is nan",
        "x3 1": [1, 1, 1, 2e-7],
    }
    rows = [{**shape, "backend": name, "fwd": cases, "bwd": {"x3 0": "dq is nan"}} for name in ("x", "less exact: y")]
    assert cells(summary(rows, less_exact=False)) == [
        ["ieee", "x", "bwd", ">= 64", "", "", "", "", "1 of 1"],
        ["ieee", "x", "fwd", ">= 64", f"{a + 0.01:.2f}", f"{b:.2f}", f"{c:.2f}", "2.0e-07", "2 of 4"],
    ]
    assert cells(summary(rows, less_exact=True))[1][4:] == ["1.00", "0.50", "0.50", "2.0e-07", "2 of 4"]
