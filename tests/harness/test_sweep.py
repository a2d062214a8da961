"""What goes wrong in one cell is that cell's row; every other cell is measured."""

from pathlib import Path

import cheats
import faults
import pytest

from flash2.core.problem import Problem
from flash2.core.sweep import Sweep

PROBLEM = Problem(batch=1, heads_q=2, seq_q=64, head_dim=32)
HONEST = f"{cheats.__file__}:Honest"


@pytest.fixture(scope="module")
def sweep():
    sweep = Sweep(resolve="flash2.backends:get_backend", device="cpu", timeout=60, seconds=0.02)
    sweep.hello([])
    yield sweep
    sweep.close()


def run(sweep, *names, problem=PROBLEM, timeout=60.0):
    sweep.timeout = timeout
    cells = [(name if ":" in name or name == "naive" else f"{Path(faults.__file__)}:{name}", "ieee") for name in names]
    return sweep.run_group(problem, cells, baseline=HONEST)


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("Segfault", "crash", "SIGSEGV"),
        ("Exits", "crash", "code 3"),
        ("RaisesWhenTimed", "error", "out of luck"),
        ("OutOfMemory", "oom", "alloc"),
        ("PredictsOutOfMemory", "oom", "GiB are free"),
        ("Raises", "error", "the kernel did not launch"),
        ("Refuses", "unsupported", "newer library"),
        ("Missing", "unavailable", "pip install nothing"),
    ],
)
def test_a_fault_is_a_row_and_the_others_are_measured(sweep, name, status, says):
    before, faulty, after = run(sweep, HONEST, name, "naive")
    assert (faulty.status, faulty.tflops) == (status, None)
    assert says in faulty.reason
    assert before.status == after.status == "ok"
    assert after.speedup is not None and after.speedup.baseline == HONEST


@pytest.mark.parametrize("name", ["Hangs", "HangsWhenTimed"])
def test_a_hang_is_a_timeout(sweep, name):
    faulty, after = run(sweep, name, "naive", timeout=8)  # a new worker must start within it, too
    assert faulty.status == "timeout" and "8 s" in faulty.reason
    assert after.status == "ok"


def test_two_crashes_in_one_group(sweep):
    statuses = [r.status for r in run(sweep, "Segfault", HONEST, "Exits")]
    assert statuses == ["crash", "ok", "crash"]


def test_what_a_problem_lacks_is_said_once(sweep):
    (row,) = run(sweep, HONEST, problem=PROBLEM.replace(softcap=3.0, window=(4, 0), pass_="bwd"))
    assert row.status == "unsupported"
    assert all(part in row.reason for part in ("no softcap", "no window", "no backward"))


def test_speedups_stay_within_a_class(sweep):
    sdpa, naive, other = sweep.run_group(
        PROBLEM.replace(dtype="fp32"), [("sdpa", "ieee"), ("naive", "ieee"), ("naive", "tf32")], baseline="sdpa"
    )
    assert sdpa.speedup is None and naive.speedup.baseline == "sdpa"
    assert other.status == "unsupported" and other.speedup is None


@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd+bwd"])
def test_every_pass_is_judged_and_timed(sweep, pass_):
    problem = PROBLEM.replace(pass_=pass_, causal=True)
    rows = sweep.run_group(problem, [("sdpa", "ieee"), ("naive", "ieee")], baseline="sdpa")
    for row in rows:
        assert row.status == "ok", row.reason
        assert row.tflops == pytest.approx(row.problem.flops / row.ms.median / 1e9)
        assert row.ms.p20 <= row.ms.median <= row.ms.p80
        assert row.error["max"] > 0 and row.kernels and len(row.rounds) >= 3


COLD = """
import os
from pathlib import Path
from flash2.core.contract import Backend, Capability


class Remembers(Backend):
    capability = Capability(devices=("cpu",), precisions={"fp32": ("ieee",)})

    def version(self):
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        seen = cache.exists()
        cache.mkdir(parents=True, exist_ok=True)
        return f"{seen} {cache}"
"""


@pytest.mark.parametrize("cold", [True, False])
def test_a_cold_sweep_begins_with_empty_caches_and_leaves_none(tmp_path, monkeypatch, cold):
    warm = tmp_path / "warm"
    warm.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(warm))
    (tmp_path / "cold.py").write_text(COLD)
    name = f"{tmp_path / 'cold.py'}:Remembers"
    sweep = Sweep(resolve="flash2.backends:get_backend", device="cpu", cold=cold)
    try:
        seen, _, cache = sweep.hello([name])[1][name]["version"].partition(" ")
        assert sweep.environment.get("caches") == ("empty" if cold else None)  # --resume tells the two apart
    finally:
        sweep.close()
    assert (seen, cache == str(warm)) == (("False", False) if cold else ("True", True))
    assert Path(cache).exists() is not cold
