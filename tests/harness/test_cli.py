"""The command line as a user meets it: in a process of its own, from the checkout, with what they mistype."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    "--backends",
    "sdpa,naive",
    "--causal",
    "no",
    "--device",
    "cpu",
    "--heads",
    "2",
    "--head-dim",
    "32",
    "--seconds",
    "0.02",
]


@pytest.fixture
def bench(tmp_path):
    def run(*words, **options):
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
        command = [sys.executable, str(ROOT / "bench.py"), *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment, **options
        )

    return run


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_help_is_quick_and_imports_nothing_optional(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "bench.py"), "--help"]
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([command[0], *command[3:]], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.3 and "--seqlen" in done.stdout
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported.splitlines()}
    assert not names & {"torch", "triton", "cupy", "numba", "numpy", "matplotlib", "tabulate", "tqdm"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--backends", "tritn"], "unknown backend 'tritn'; known: naive"),
        (["--backends", "./mine.py:Mine"], "no file ./mine.py"),
        (["--dtype", "int8"], "fp64, fp32, fp16, bf16"),
        (["--preset", "llama9"], "llama3-8b"),
        (["--heads", "3", "--kv-heads", "2"], "not a multiple of heads_kv"),
        (["--seqlen", "-5"], "is no size"),
        (["--seqlen", "0"], "is no size"),
        (["--head-dim", "99999999999"], "is no size"),
        (["--pass", "forward"], "fwd, bwd, fwd+bwd"),
        (["--precision", "fp8"], "ieee, tf32"),
        (["--format", "yaml"], "table"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--sequence", "5"], "--sequence"),
        (["--tokens", "1000", "--seqlen", "512"], "not a multiple"),
        (["--baseline", "nobody"], "unknown backend 'nobody'"),
        (["--precision", "tf32", "--dtype", "bf16"], "no class of dtype"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["compare", "a.jsonl", "b.jsonl"], "a.jsonl"),
        (["explain", "--backends", "tritn"], "unknown backend 'tritn'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bench, tmp_path, words, says):
    done = bench(*words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not done.stdout
    assert not (tmp_path / "state" / "flash2" / "last.jsonl").exists()


def test_a_config_with_a_wrong_key(bench, tmp_path):
    (tmp_path / "c.toml").write_text("sequence = 5\n")
    done = bench("--config", "c.toml")
    assert done.returncode == 2 and "unknown option 'sequence'; known: backends" in done.stderr


def test_an_unwritable_or_corrupt_file_is_refused_before_anything_runs(bench, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"schema": 1}\n{"schema": 1}\n')
    corrupt = bench(*TINY, "--seqlen", "64", "--out", "bad.jsonl", "--resume")
    assert corrupt.returncode == 2 and "line 1 is not a result" in corrupt.stderr
    (tmp_path / "file").write_text("")
    unwritable = bench(*TINY, "--seqlen", "64", "--out", "file/r.jsonl")
    assert unwritable.returncode == 2 and "file" in unwritable.stderr and not unwritable.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_run_and_still_shows_what_was_measured(bench):
    done = bench(*TINY, "--seqlen", "64,128", "--out", "/dev/full")
    assert done.returncode == 2 and "/dev/full: No space left" in done.stderr
    assert "naive" in done.stdout and "n128" not in done.stdout


def test_run_resume_report_compare(bench, tmp_path):
    first = bench(*TINY, "--seqlen", "64,128", "--out", "r.jsonl")
    assert first.returncode == 0, first.stderr
    assert "speed-up: against sdpa" in first.stdout and all(len(line) <= 100 for line in first.stdout.splitlines())
    assert [(r["backend"], r["problem"]["seq_q"], r["status"]) for r in records(tmp_path / "r.jsonl")] == [
        ("sdpa", 64, "ok"), ("naive", 64, "ok"), ("sdpa", 128, "ok"), ("naive", 128, "ok"),
    ]  # fmt: skip
    again = bench(*TINY, "--seqlen", "64,128,256", "--out", "r.jsonl", "--resume", "--format", "json")
    assert again.returncode == 0, again.stderr
    assert [r["problem"]["seq_q"] for r in records(tmp_path / "r.jsonl")[4:]] == [256, 256]
    assert len(json.loads(again.stdout)) == 6

    for form, marks in (("table", "n64"), ("markdown", "|"), ("csv", "backend,problem"), ("json", '"schema": 1')):
        shown = bench("report", "r.jsonl", "--format", form)
        assert shown.returncode == 0 and marks in shown.stdout

    for name, ms in (("before", 1.0), ("after", 1.2)):
        steady = [r | {"rounds": [ms] * 9} for r in records(tmp_path / "r.jsonl")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steady))
    same = bench("compare", "before.jsonl", "before.jsonl", "--fail-on-regression", "5%")
    assert same.returncode == 0 and same.stdout.count(" same") == 6
    worse = bench("compare", "before.jsonl", "after.jsonl", "--fail-on-regression", "5%")
    assert worse.returncode == 1 and "6 of 6 cells regressed" in worse.stdout
    assert bench("compare", "before.jsonl", "after.jsonl", "--fail-on-regression", "30%").returncode == 0
    assert bench("compare", "before.jsonl", "after.jsonl").returncode == 0


def test_pages_are_checked_against_their_files(bench, tmp_path):
    assert bench(*TINY, "--seqlen", "64", "--out", "r.jsonl").returncode == 0
    (tmp_path / "README.md").write_text("# x\n<!-- table: r.jsonl -->\nold\n<!-- /table -->\nend\n")
    words = ("report", "r.jsonl", "--into", "README.md")
    assert bench(*words, "--check").returncode == 1
    assert bench(*words, "--write").returncode == 0
    assert bench(*words, "--check").returncode == 0
    assert "| naive" in (tmp_path / "README.md").read_text() and "old" not in (tmp_path / "README.md").read_text()
    (tmp_path / "r.md").write_text((tmp_path / "r.md").read_text().replace("naive", "magic"))
    assert bench(*words, "--check").returncode == 1


def test_dry_run_and_print_config_measure_nothing(bench, tmp_path):
    plan = bench("--preset", "gpt2", "--backends", "naive,sdpa", "--device", "cpu", "--dry-run")
    assert plan.returncode == 0 and "2 cells on cpu" in plan.stdout
    config = bench("--preset", "gpt2", "--device", "cpu", "--print-config")
    assert 'heads = "12"' in config.stdout
    assert not (tmp_path / "state").exists()


def test_a_backward_on_the_cpu_ends_in_a_time(bench):
    pytest.importorskip("numba")
    done = bench(
        "--backends", "numba,sdpa-flash", *TINY[2:], "--seqlen", "64", "--pass", "bwd", "--format", "json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(r["backend"], r["status"], r["reason"]) for r in json.loads(done.stdout)] == [
        ("numba", "ok", ""), ("sdpa-flash", "ok", ""),
    ]  # fmt: skip


def test_list_explain_doctor(bench):
    listed = bench("list", "--device", "cpu")
    assert "naive" in listed.stdout and "needs a CUDA device" in " ".join(listed.stdout.split())
    explained = bench(
        "explain", "--device", "cpu", "--softcap", "20", "--dtype", "bf16", "--seqlen", "64", "--causal", "no"
    )
    assert (
        "can run it: naive" in explained.stdout
        and "nearest it can: b1-h8-n64-d64-fp32-ieee-fwd" not in explained.stdout
    )
    assert "sdpa: no softcap" in explained.stdout
    assert "torch" in bench("doctor").stdout


def test_a_backend_in_a_file_and_its_chatter(bench, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom faults import Chatty as Mine\n"
    )
    done = bench("--backends", "sdpa,./mine.py:Mine", *TINY[2:], "--seqlen", "64", "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)  # nothing that a library printed is in it
    assert [r["status"] for r in rows] == ["ok", "ok"], rows


def test_a_broken_plug_in_is_unavailable_and_the_rest_runs(bench, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    done = bench("--backends", "sdpa,./broken.py:Mine", *TINY[2:], "--seqlen", "64", "--format", "json")
    ok, broken = json.loads(done.stdout)
    assert ok["status"] == "ok" and broken["status"] == "unavailable" and "no_such_package" in broken["reason"]


LONG = [*TINY, "--seqlen", "64,128,256,512,1k,2k,4k", "--causal", "both", "--seconds", "1"]


def start(tmp_path, *words):
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "bench.py"), *words], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    out = tmp_path / "r.jsonl"
    while time.monotonic() < end and not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        time.sleep(0.05)
    return process, out


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ctrl_c_leaves_a_file_to_go_on_from(tmp_path):
    process, out = start(tmp_path, *LONG, "--out", "r.jsonl")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the worker too
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    assert all(r["status"] == "ok" for r in records(out)) and len(records(out)) >= 2


def test_kill_9_of_the_parent_takes_the_worker_along_and_loses_no_cell(tmp_path):
    process, out = start(tmp_path, *LONG, "--out", "r.jsonl")
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    end = time.monotonic() + 20
    while time.monotonic() < end and any(map(alive, workers)):
        time.sleep(0.1)
    assert workers and not any(map(alive, workers))
    assert all(r["status"] == "ok" for r in records(out)) and len(records(out)) >= 2


def test_kill_9_of_the_worker_is_a_row(tmp_path):
    process, out = start(tmp_path, *TINY, "--seqlen", "64,1k,2k", "--seconds", "2", "--out", "r.jsonl")
    for worker in children(process.pid):
        if b"spawn_main" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(worker, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    found = records(out)
    assert len(found) == 6 and [r["status"] for r in found].count("crash") == 1
    assert "SIGKILL" in next(r["reason"] for r in found if r["status"] == "crash")
