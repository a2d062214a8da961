"""The page that compares the ways to write a kernel: what is counted, which figures are taken, what is left out."""

import pytest

from flash2.core import ways
from flash2.core.compare import Quantiles
from flash2.core.problem import Problem
from flash2.core.report import fill_tables
from flash2.core.results import Result, ResultFile

PYTHON = '''"""Docstring
of two lines."""

import numba  # with a comment


# a comment alone
@numba.njit(cache=True)
def f(x):
    """Another."""
    text = """
    not a docstring
    """
    return x, text
'''
CUDA = """// a comment
#include "x.cuh"
/* more
   of it */
__global__ void f() {  // here
    int x = 0; /* and */ int y;

}
"""


def test_lines_that_hold_code_are_counted():
    assert ways.python_lines(PYTHON) == 7
    assert ways.cuda_lines(CUDA) == 4


@pytest.mark.parametrize(
    ("decorator", "found"),
    [("@numba.njit(cache=True)", True), ("@triton.jit", True), ("@gluon.jit", True), ("@cuda.jit(device=True)", True),
     ("@_jit", True), ("@functools.cache", False), ("@jitter", False)],
)  # fmt: skip
def test_a_file_with_a_compiled_function_holds_kernels(decorator, found):
    assert ways.holds_kernels(PYTHON.replace("@numba.njit(cache=True)", decorator)) is found


def test_every_way_has_sources_of_its_own():
    files = [path for way in ways.WAYS for path in ways.sources(way)]
    assert len(files) == len(set(files))
    for way in ways.WAYS:
        kernels, around = ways.lines(way)
        assert kernels > 50 and (around > 50) is not way.eager, way.title
    assert {"tune.py", "offline.py"} & {path.name for path in files} == set()


def result(backend, precision="ieee", pass_="fwd", *, seq=64, tflops=2.0, build_ms=3001.0, caches="empty"):
    dtype = precision if precision in ("fp16", "bf16") else "fp32"
    problem = Problem(seq_q=seq, head_dim=32, dtype=dtype, precision=precision, pass_=pass_)
    environment = {"device": "Some GPU", **({"caches": caches} if caches else {})}
    return Result(
        backend=backend, problem=problem, status="ok", ms=Quantiles(1.0, 0.9, 1.1), tflops=tflops, build_ms=build_ms,
        environment=environment,
    )  # fmt: skip


def write(path, *results):
    file = ResultFile(path)
    for r in results:
        file.append(r)
    file.close()


def rows(text):
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in table}


def test_first_calls_are_those_of_runs_that_began_with_empty_caches(tmp_path):
    """The most of any cell, less what a later call takes; of the first file that has it."""
    write(
        tmp_path / "a.jsonl",
        result("triton", build_ms=1001.0), result("triton", build_ms=5001.0, seq=128), result("triton", pass_="bwd"),
        result("cupy", caches=None, build_ms=9001.0), result("naive", build_ms=2001.0),
    )  # fmt: skip
    write(tmp_path / "b.jsonl", result("naive", build_ms=7001.0), result("numba", build_ms=8001.0))
    found = rows(ways.overview([tmp_path / "a.jsonl", tmp_path / "absent.jsonl", tmp_path / "b.jsonl"]))
    assert found["Triton"][-2:] == ["5", "3"]
    assert found["CUDA C++ through CuPy"][-2:] == ["", ""]
    assert found["PyTorch"][-2:] == ["2", ""]
    assert found["numba for the CPU"][-2:] == ["8", ""]


def test_speeds_are_of_the_problem_that_most_ways_were_measured_on(tmp_path):
    write(
        tmp_path / "a.jsonl",
        result("triton", seq=512, tflops=9.0), result("sdpa", seq=512), result("triton", tflops=4.0),
        result("numba-cuda", tflops=1.5), result("numba-cuda", pass_="bwd", tflops=0.5),
        result("triton", "bf16", tflops=8.0),
    )  # fmt: skip
    text = ways.speeds([tmp_path / "absent.jsonl", tmp_path / "a.jsonl"], tmp_path / "docs")
    assert rows(text) == {
        "way": ["ieee", "bf16"], "Triton": ["4 /", "8 /"], "numba for CUDA": ["1.5 / 0.5", ""]
    }  # fmt: skip
    assert "Some GPU" in text and "seq 64" in text and "(../a.md)" in text


def test_the_page_is_filled_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- ways: x.jsonl y.jsonl -->\nold\n<!-- /ways -->\nb\n<!-- speeds: x.jsonl -->\nold\n<!-- /speeds -->\nc\n"
    )
    write(tmp_path / "y.jsonl", result("gluon", "bf16"))
    text = fill_tables(page)
    assert "old" not in text and text.endswith("<!-- /speeds -->\nc\n")
    assert rows(text)["Gluon"][-2:] == ["3", ""]
    page.write_text(text)
    assert fill_tables(page) == text
