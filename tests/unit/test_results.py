"""The results file keeps every finished cell through torn lines, and refuses what is no result."""

import json

import pytest

from flash2.core.compare import Quantiles, Speedup, quantiles, speedup
from flash2.core.problem import Problem
from flash2.core.results import Result, ResultFile, fingerprint, read_results


def result(backend="naive", status="ok", seed=0, **fields):
    if status == "ok":
        fields = {"ms": Quantiles(1.0, 0.9, 1.1), "rounds": (1.0, 1.1), "tflops": 2.0, **fields}
    else:
        fields = {"reason": "because", **fields}
    problem = Problem(seq_q=64, head_dim=32, window=(4, None))
    return Result(backend=backend, problem=problem, status=status, environment={"seed": seed}, **fields)


def write(path, *results):
    file = ResultFile(path)
    for r in results:
        file.append(r)
    file.close()


def test_round_trip(tmp_path):
    wrote = [
        result(speedup=Speedup(baseline="b", ratio=1.5, low=1.4, high=1.6, verdict="faster")),
        result("other", "oom"),
    ]
    write(tmp_path / "r.jsonl", *wrote)
    assert read_results(tmp_path / "r.jsonl") == wrote


def test_the_record_has_the_promised_keys(tmp_path):
    write(tmp_path / "r.jsonl", result())
    record = json.loads((tmp_path / "r.jsonl").read_text())
    promised = {
        "schema", "backend", "status", "reason", "problem", "ms", "tflops", "peak_fraction", "error", "speedup",
        "peak_bytes", "kernels", "environment",
    }  # fmt: skip
    assert promised <= set(record)
    assert set(record["problem"]) == {
        "batch", "heads_q", "heads_kv", "seq_q", "seq_kv", "head_dim", "dtype", "precision", "causal", "window",
        "softcap", "alibi", "scale", "pass",
    }  # fmt: skip
    assert set(record["ms"]) == {"median", "p20", "p80"}


@pytest.mark.parametrize("cut", [1, 9, 40, -2])
def test_a_torn_last_line_costs_only_itself(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    write(path, result("one"), result("two"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:cut])
    assert [r.backend for r in read_results(path)] == ["one"]
    write(path, result("three"))  # the next run begins a new line
    assert [r.backend for r in read_results(path)] == ["one", "three"]


@pytest.mark.parametrize("line", ["garbage", "[]", '{"schema": 99}', '{"schema": 1, "backend": "x"}', "{}"])
def test_another_bad_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    write(path, result())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 2 is not a result"):
        read_results(path)


def test_the_latest_record_of_a_cell_counts(tmp_path):
    write(tmp_path / "r.jsonl", result(status="crash"), result(), result(seed=1))
    assert [(r.status, r.environment["seed"]) for r in read_results(tmp_path / "r.jsonl")] == [("ok", 0), ("ok", 1)]


def test_an_unwritable_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        ResultFile(tmp_path / "file" / "r.jsonl")


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "odd"},
        {"status": "ok", "tflops": None},
        {"status": "wrong", "tflops": 1.0},
        {"status": "oom", "reason": ""},
    ],
)
def test_no_number_without_a_verdict(fields):
    with pytest.raises(ValueError):
        result(**fields)


def test_nan_is_not_json(tmp_path):
    write(tmp_path / "r.jsonl", result(error={"max": float("nan"), "rms": float("inf"), "worst_row": 1 / 3}))
    assert read_results(tmp_path / "r.jsonl")[0].error == {"max": None, "rms": None, "worst_row": 0.333333}


def test_readings_do_not_change_the_fingerprint():
    one = {"device": "x", "time": "now", "ceilings": {"ieee": 1.0}}
    assert (
        fingerprint(one) == fingerprint(one | {"time": "later", "ceilings": {}}) != fingerprint(one | {"device": "y"})
    )


def test_quantiles_against_the_definition():
    assert quantiles([5, 1, 2, 3, 4]) == Quantiles(3, 1.8, 4.2)
    assert quantiles([7.0]) == Quantiles(7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([1.0] * 20, "same"), ([0.5] * 20, "faster"), ([2.0] * 20, "slower"), ([0.5, 2.0] * 10, "unclear")],
)
def test_verdicts(ours, verdict):
    gain = speedup("b", [1.0] * 20, ours, paired=True)
    assert gain.verdict == verdict and gain.low <= gain.ratio <= gain.high


def test_pairing_cancels_what_moves_both():
    drift = [1 + 0.05 * i for i in range(20)]
    paired = speedup("b", drift, [0.9 * d for d in drift], paired=True)
    assert paired.ratio == pytest.approx(1 / 0.9) and paired.high - paired.low < 1e-9
    assert speedup("b", drift, [0.9 * d for d in drift], paired=False).verdict == "unclear"
