"""Tables are made of results files: what stands beside what, and what a marker in a document becomes."""

import dataclasses
import json

from flash2.core.compare import Quantiles
from flash2.core.problem import Problem
from flash2.core.report import block, fill_tables, pivots, ratios
from flash2.core.results import Result


def result(backend, precision, seq, tflops=1.0, status="ok"):
    problem = Problem(seq_q=seq, head_dim=64, precision=precision)
    if status != "ok":
        return Result(backend=backend, problem=problem, status=status, reason="because")
    return Result(backend=backend, problem=problem, status=status, tflops=tflops, ms=Quantiles(1.0, 0.9, 1.1))


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


def test_rows_of_one_class_stand_together_in_the_order_they_were_measured():
    measured = [
        result("sdpa", "tf32x3", 512), result("naive", "ieee", 512), result("naive", "tf32", 512),
        result("math", "ieee", 512, 2.0), result("naive", "ieee", 1024, 3.0), result("math", "ieee", 1024, status="oom"),
    ]  # fmt: skip
    assert cells(pivots(measured)) == [
        ["backend", "class", "512", "1024"],
        ["naive", "ieee", "1", "3"],
        ["math", "ieee", "2", "oom"],
        ["naive", "tf32", "1", ""],
        ["sdpa", "tf32x3", "1", ""],
    ]


def test_a_backend_that_cannot_take_part_has_no_row():
    assert len(cells(pivots([result("a", "ieee", 512), result("b", "ieee", 512, status="unsupported")]))) == 2


def test_a_marker_is_filled_from_the_file_beside_the_document(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(result("naive", "tf32", 512, 7.0).to_record()) + "\n")
    (tmp_path / "d.md").write_text("a\n<!-- table: r.jsonl -->\nold\n<!-- /table -->\nb\n")
    filled = fill_tables(tmp_path / "d.md")
    assert filled.startswith("a\n<!-- table: r.jsonl -->\n") and filled.endswith("<!-- /table -->\nb\n")
    assert "old" not in filled and cells(filled)[1] == ["naive", "tf32", "7"]


def test_ratios_are_geometric_means_with_the_worst_cell():
    measured = [
        result("ours", "tf32", 512, 8.0), result("flex", "tf32", 512, 2.0), result("fa4", "tf32", 512, 4.0),
        result("ours", "tf32", 1024, 3.0), result("flex", "tf32", 1024, 3.0), result("naive", "tf32", 2048, 1.0),
        result("ours", "ieee", 512, 9.0), result("fa4", "ieee", 512, status="unsupported"),
    ]  # fmt: skip
    assert cells(ratios(measured)) == [
        ["pass", "class", "backend", "cells", "flex", "fa4", "the best"],
        ["fwd", "tf32", "ours", "2", "2.00 (1.00)", "2.00 (2.00)", "1.41 (1.00)"],
    ]


def test_a_narrow_terminal_names_the_columns_that_it_has_no_room_for():
    """But not the first call's seconds, which are there where there is room."""
    measured = [result("naive", "tf32", 512)]
    wide = dataclasses.replace(measured[0], build_ms=1500.0, peak_bytes=1 << 20)
    assert "first call s" in block([wide], 200) and "1.5" in block([wide], 200)
    assert "no room" not in block([wide], 200)
    narrow = block([wide], 42)
    assert "no room for: MiB;" in narrow and "first call" not in narrow
    assert max(map(len, narrow.splitlines())) <= 42
