"""A training run's record, table, page and picture; and the commands, with backends that fail in every way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash2.core.compare import Quantiles
from flash2.core.report import fill_tables, page
from flash2.core.training import checkpoint, runs, session
from flash2.core.training.options import Options
from flash2.core.training.runs import Run
from flash2.core.training.session import Training
from flash2.core.training.trainer import handle

ROOT = Path(__file__).parents[2]
TINY = [
    "--layers", "1", "--width", "16", "--heads", "1", "--context", "32", "--batch", "2", "--steps", "12",
    "--validation-tokens", "256", "--sample", "8", "--precision", "ieee", "--device", "cpu",
]  # fmt: skip


def run(backend: str = "sdpa", losses=(5.0, 4.0, 2.0), seed: int = 0, **changes) -> Run:
    fields = {
        "status": "ok", "options": Options(batch=2, context=100, steps=3, seed=seed).to_dict(), "parameters": 99_000_000,
        "losses": tuple(losses), "validation": ((3, losses[-1]),) if losses else (), "step_ms": Quantiles(10.0, 9.0, 11.0),
        "attention_share": 0.25, "peak_bytes": 3 << 30, "sample": "\0def f():\n    ```\n",
        "environment": {"device": "toy", "time": "now"},
    }  # fmt: skip
    return Run(backend=backend, **(fields | changes))


FAILED = {
    "status": "oom",
    "reason": "out of memory",
    "step_ms": None,
    "losses": (),
    "parameters": None,
    "attention_share": None,
    "peak_bytes": None,
    "validation": (),
    "sample": "",
}
THREE = [run(), run("triton", (5.0, 4.04, 2.01)), run("sdpa", (5.0, 3.6, 2.2), seed=1), run("naive", **FAILED)]


def write(path: Path, some: list[Run]) -> Path:
    path.write_text("".join(json.dumps(one.to_record()) + "\n" for one in some))
    return path


def test_records_come_back(tmp_path):
    path = write(tmp_path / "a.jsonl", THREE)
    assert runs.holds_runs(path) and runs.read_runs(path) == THREE
    path.write_text(path.read_text() + '{"kind": "training", "schema": 1, "backe')
    assert runs.read_runs(path) == THREE  # torn: the process was killed while it wrote
    path.write_text(path.read_text() + '\n{"kind": "training", "schema": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 6 is not a training run"):
        runs.read_runs(path)


def test_a_run_keeps_its_race_and_old_records_have_none(tmp_path):
    raced = run("triton", turns={"sdpa": Quantiles(20.0, 19.0, 21.0), "triton": Quantiles(19.02, 19.0, 19.5)})
    assert runs.read_runs(write(tmp_path / "a.jsonl", [raced])) == [raced]
    long = dataclasses.replace(raced, turns=raced.turns | {"sdpa": Quantiles(20.00000004, 19.0, 21.0)})
    assert long.to_record() == raced.to_record()  # five digits, as of a run's own step
    old = run().to_record()
    assert old.pop("turns") == {} and Run.from_record(old) == run()


def test_a_later_run_of_the_same_key_wins(tmp_path):
    again = dataclasses.replace(run(), losses=(1.0,), environment={"device": "toy", "time": "later"})
    assert runs.read_runs(write(tmp_path / "a.jsonl", [*THREE, again]))[0] == again


@pytest.mark.parametrize("changes", [{"status": "fine"}, {"status": "oom", "reason": "x"}, {**FAILED, "reason": ""}])
def test_a_run_without_its_verdict_is_refused(changes):
    with pytest.raises(ValueError, match=r"status|carry a step time|must say why"):
        run(**changes)


def test_the_table_says_what_was_asked_for():
    table = runs.table(THREE)
    first, second, third, fourth = table.splitlines()[2:6]
    assert first.split()[:4] == ["sdpa", "ok", "10", "2e+04"] and "25 %" in first and "2.0000" in first
    assert "+0.50 %" in second and "1.0e-02 at 1" in second
    assert third.startswith("sdpa, seed 1") and "+10.00 %" in third and "1.0e-01 at 2" in third
    assert fourth.split() == ["naive", "oom"] and "naive: oom: out of memory" in table
    assert runs.table(THREE, "markdown").startswith("| backend")
    assert '"sdpa, seed 1",ok' in runs.table(THREE, "csv") and len(json.loads(runs.table(THREE, "json"))) == 4


def test_ratios_are_of_one_race():
    """Each run's own; a run that failed has none, and a table of runs without a race has no such column."""
    first, second = ({"sdpa": Quantiles(20.0, 1, 99), name: Quantiles(19.02, 1, 99)} for name in ("triton", "numba"))
    second["sdpa"] = Quantiles(10.0, 1, 99)
    raced = [run(turns=first), run("triton", turns=first), run("numba", turns=second), run("naive", turns=first)]
    for form in ("table", "markdown", "csv"):
        assert "in turns" in runs.table(raced, form) and "in turns" not in runs.table(THREE, form)
    rows = [line.split(",") for line in runs.table(raced, "csv").splitlines()]
    place = rows[0].index("in turns")
    assert [row[place] for row in rows[1:]] == ["", "0.951", "1.902", ""]
    failed = run("triton", **FAILED, turns=first)
    assert "in turns" not in runs.table([raced[0], failed])
    assert "in turns" not in runs.table([run("triton", turns={"triton": first["triton"], "numba": second["numba"]})])


def test_runs_of_other_work_are_not_compared():
    longer = dataclasses.replace(run("triton"), options=THREE[0].options | {"steps": 9})
    assert runs.baseline_of(THREE[1], THREE) is THREE[0] and runs.baseline_of(longer, THREE) is None
    assert "+0.00 %" not in runs.table([THREE[0], longer])


def test_pages_and_documents_are_made_from_the_file(tmp_path):
    path = write(tmp_path / "gpt.jsonl", THREE)
    text = page(path)
    assert "99 M parameters" in text and "context 100" in text and "+0.50 %" in text and "oom: out of memory" in text
    assert "\n    def f():\n" not in text and "def f():\n        ```\n" in text  # nothing ends the sample's block
    document = tmp_path / "training.md"
    document.write_text(
        "<!-- table: gpt.jsonl -->\nold\n<!-- /table -->\n<!-- sample: gpt.jsonl -->\nold\n<!-- /sample -->\n"
    )
    filled = fill_tables(document)
    assert "old" not in filled and "+0.50 %" in filled and "def f():" in filled
    document.write_text(filled)
    assert fill_tables(document) == filled


def test_the_picture_is_one_and_shows_every_curve(tmp_path):
    pytest.importorskip("matplotlib")
    runs.picture(THREE, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    runs.picture([run("naive", **FAILED)], tmp_path / "none.png")


def test_the_seeds_are_of_sdpa_alone():
    training = Training(backends=["triton", "sdpa", "numba"], seeds=(4, 5))
    assert training._plan(training.backends) == [("triton", 4), ("sdpa", 4), ("sdpa", 5), ("numba", 4)]


class Inside:
    """A Worker in this process; `asked` has what it was asked for."""

    asked: tuple = ()

    def __init__(self, target: str) -> None:
        assert target == session.HANDLER

    def events(self, request, deadline):
        Inside.asked += (request,)
        found = []
        handle(found.append, json.loads(json.dumps(request)))
        yield from json.loads(json.dumps(found))

    def close(self) -> None:
        pass

    kill = close


@pytest.fixture
def train(monkeypatch, tmp_path, one_thread):
    """train(backends, ...) -> (the runs, what the workers were asked for: ops, and the race's backends)."""
    monkeypatch.setattr(session, "Worker", Inside)
    given = {
        "layers": 1, "width": 16, "heads": 1, "context": 32, "batch": 2, "steps": 2, "validation_tokens": 64, "sample": 0,
    }  # fmt: skip

    def run_it(backends, **changes):
        Inside.asked = ()
        found = Training(backends=backends, given=given, out=tmp_path / "a.jsonl", device="cpu", **changes).run()
        ops = [request["op"] for request in Inside.asked]
        return found, ops, [request["backends"] for request in Inside.asked if request["op"] == "race"]

    return run_it


def test_backends_race_once_before_they_train(train, tmp_path):
    found, ops, (raced,) = train(["sdpa", "naive"], seeds=(0, 1), rounds=1)
    assert ops == ["hello", "race", "train", "train", "train"] and raced == ["sdpa", "naive"]
    assert found[0].turns.keys() == {"sdpa", "naive"} and all(one.turns == found[0].turns for one in found)
    assert all(spread.p20 > 0 for spread in found[0].turns.values())
    assert [one.turns.keys() for one in runs.read_runs(tmp_path / "a.jsonl")] == [found[0].turns.keys()] * 3

    again, ops, _ = train(["sdpa", "naive"], seeds=(0, 1), rounds=1, resume=True)
    assert ops == ["hello"] and [one.backend for one in again] == ["sdpa", "sdpa", "naive"]

    (kept, new), ops, (raced,) = train(["sdpa", "sdpa-math"], rounds=1, resume=True)
    assert ops == ["hello", "race", "train"] and raced == ["sdpa", "sdpa-math"]
    assert kept.turns == again[0].turns and new.turns.keys() == {"sdpa", "sdpa-math"}  # a race of its own


@pytest.mark.parametrize(
    "changes", [{"rounds": 0}, {"rounds": None}, {"backends": ["sdpa"], "seeds": (0, 1), "rounds": 2}], ids=str
)
def test_no_race_where_none_is_asked_for_or_nobody_to_race(changes, train):
    found, ops, _ = train(**({"backends": ["sdpa", "naive"]} | changes))
    assert ops == ["hello", "train", "train"] and not any(one.turns for one in found)


def command(*words, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=240, cwd=cwd, env=environment
    )


CRASHES = """
import os, signal
from flash2.backends.naive import Naive

class Crashes(Naive):
    calls = 0

    def forward(self, q, k, v, spec):
        self.calls += 1
        if self.calls == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().forward(q, k, v, spec)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which bench.py has trained sdpa and a backend that dies, in turns as well; and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "wild.py").write_text(CRASHES)
    words = ["train", "--backends", "sdpa,./wild.py:Crashes", *TINY, "--out", "a.jsonl", "--plot", "a.png"]
    kept = ["--checkpoints", "kept", "--save-every", "5"]
    done = command(ROOT / "bench.py", *words, *kept, "--rounds", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "no steps in turns: the worker was killed by SIGSEGV" in done.stderr
    return folder, done.stdout


def test_bench_train_survives_its_backends(trained):
    folder, printed = trained
    ok, crash = runs.read_runs(folder / "a.jsonl")
    assert (ok.status, crash.status) == ("ok", "crash") and "SIGSEGV" in crash.reason and "SIGSEGV" in printed
    assert ok.turns == crash.turns == {}  # that cost the race, not the runs
    assert 1 <= len(crash.losses) < 5  # what was learnt of it before
    assert len(ok.losses) == 12 and ok.validation[-1][0] == 12 and ok.sample and ok.tokens_per_s > 0
    assert (folder / "a.png").stat().st_size > 1000


def test_bench_train_does_not_train_again_what_is_finished(trained):
    folder, _ = trained
    words = ["train", "--backends", "sdpa", *TINY, "--out", "a.jsonl", "--resume"]
    done = command(ROOT / "bench.py", *words, cwd=folder)
    assert done.returncode == 0 and " ok " in done.stdout, done.stderr
    assert (folder / "a.jsonl").read_text().count('"backend": "sdpa"') == 1


def test_the_example_goes_on_from_a_checkpoint_and_writes(trained):
    folder, _ = trained
    words = [*TINY, "--steps", "15", "--backend", "sdpa", "--checkpoints", "kept", "--resume", "--log", "log.jsonl"]
    done = command(ROOT / "examples" / "train_gpt.py", *words, cwd=folder)
    assert done.returncode == 0 and "sdpa writes:" in done.stdout, done.stderr
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [12, 13, 14]


def test_a_checkpoint_of_another_model_is_the_users_to_mend(tmp_path):
    """What the worker says, and what the parent makes of it."""
    model = Options(layers=1, width=16, heads=1, context=32, batch=1, steps=1)
    checkpoint.save(tmp_path / "naive.pt", {"shape": model.model() | {"width": 32}})
    events = []
    request = {"op": "train", "backend": "naive", "device": "cpu", "options": model.to_dict(), "resume": True}
    handle(events.append, request | {"file": str(tmp_path / "naive.pt"), "save_every": 1})
    (event,) = events
    assert event["event"] == "refused" and "naive.pt is of another model: width 32, not 16" in event["reason"]

    class Answers:
        def events(self, request, deadline):
            yield from events

    with pytest.raises(ValueError, match="is of another model"):
        Training()._one(Answers(), run("naive", **FAILED), "cpu", None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench.py", "train", "--backends", "tritn"], "unknown backend 'tritn'; known: "),
        (["bench.py", "train", "--heads", "7"], "not a multiple of heads 7"),
        (["bench.py", "train", "--seeds", "x"], "'x' is not an integer"),
        (["bench.py", "train", "--steps", "-1"], "'-1' is no size"),
        (["bench.py", "train", "--width", "many"], "'many' is no size"),
        (["bench.py", "train", "--rounds", "-1"], "rounds must be 0 or more, not -1"),
        (["bench.py", "train", "--rounds", "few"], "invalid int value: 'few'"),
        (["bench.py", "train", "--lr", "nan"], "lr must be above 0"),
        (["bench.py", "train", "--out", "/proc/no/such/a.jsonl"], "/proc/no"),
        (["examples/train_gpt.py", "--backend", "tritn"], "unknown backend 'tritn'"),
        (["examples/train_gpt.py", "--backend", "sdpa-cudnn", "--device", "cpu"], "sdpa-cudnn is un"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path):
    done = command(ROOT / words[0], *words[1:], cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
