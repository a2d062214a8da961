"""What the Triton tuner tries, what it remembers of compiling, and the rows it makes of a race; no GPU needed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from flash2.backends.triton_fa2 import configs, tune  # noqa: E402
from flash2.backends.triton_fa2.configs import parse  # noqa: E402
from flash2.backends.triton_fa2.offline import Build  # noqa: E402
from flash2.core.problem import Problem  # noqa: E402

D64 = Problem(batch=8, heads_q=32, seq_q=2048, head_dim=64, dtype="bf16", precision="bf16", pass_="fwd+bwd")
D256 = D64.replace(head_dim=256, heads_q=8, heads_kv=8)


def build(registers=100, spills=0, shared=50_000):
    return Build(registers, spills, shared, Counter())


def raced(*times: tuple[str, dict[int, float]]) -> list[dict]:
    """Records of a race: (configuration, milliseconds by length)."""
    return [{"config": parse(text), "ms": ms, "final": True} for text, ms in times]


def cells_of_the_table(arch: int):
    """(kernel, problem) of every full and masked row."""
    for kernel, precision, head_dim, work in configs.table(f"sm{arch}"):
        dtype = precision if precision in ("bf16", "fp16") else "fp32"
        if work != "dressed":
            causal = work == "masked"
            yield kernel, D64.replace(dtype=dtype, precision=precision, head_dim=head_dim, causal=causal)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_sweep_tries_the_tables_own_row(steps):
    """Else a new winner is compared with nothing."""
    for kernel, problem in cells_of_the_table(90):
        assert tune.present(kernel, problem, 90) in tune.narrowed(kernel, problem, 90, steps), (kernel, problem.key())


def test_a_narrow_sweep_stays_near():
    rows = [row.replace(one_loop=False) for key, row in configs.table("sm90").items() if key[:3] == ("dq", "bf16", 64)]
    for config in (near := tune.narrowed("dq", D64, 90, 1)):
        assert any(tune.distance(config, row) <= 1 for row in rows)
    assert len(near) < len(tune.narrowed("dq", D64, 90, 2)) < len(tune.candidates("dq", D64, 90))


def test_where_nothing_was_raced_a_sweep_is_wide():
    assert tune.narrowed("fwd", D64, 70, 1) == tune.candidates("fwd", D64, 70)


def test_a_head_dim_without_rows_starts_from_another_ones(monkeypatch):
    monkeypatch.setattr(configs, "table", lambda arch: {("fwd", "bf16", 64, "full"): parse("64x128 w4 s2 tma")})
    assert tune.narrowed("fwd", D256, 90, 1) == [parse("64x64 w4 s2 tma")]  # 64x128 has no room for both tiles


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        ("64x64 w4 s2", "64x64 w4 s2", 0),
        ("64x64 w4 s2", "128x64 w8 s2", 2),
        ("64x64 w4 s1", "64x64 w4 s4", 1),
        ("64x16 w4 s2 tma", "64x64 w4 s2 late", 4),
    ],
)
def test_distance(a, b, steps):
    assert tune.distance(parse(a), parse(b)) == tune.distance(parse(b), parse(a)) == steps


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "squeezed"),
    [
        (4, 177, 66_000, 168),  # two programs, three if each thread takes 168
        (4, 168, 66_000, 0),  # three already; four would take 128
        (4, 140, 50_000, 128),
        (4, 177, 90_000, 0),  # shared memory has no room for a third
        (8, 150, 60_000, 128),
        (8, 250, 60_000, 0),  # half of the registers would be too few
    ],
)
def test_one_more_program(warps, registers, shared, squeezed):
    config = parse(f"64x64 w{warps} s2")
    found = tune.squeezed(config, build(registers=registers, shared=shared))
    assert found == (config.replace(max_regs=squeezed) if squeezed else None)


@pytest.mark.parametrize(
    ("config", "registers", "spills", "relaxed"),
    [
        ("64x64 w4 s2", 168, 8, True),  # ptxas stopped at a third program
        ("64x64 w4 s2", 255, 8, False),  # there are no more
        ("64x64 w4 s2", 168, 0, False),
        ("64x64 w4 s2 r168", 168, 8, False),  # as it was told
        ("64x64 w16 s2", 128, 8, False),  # 255 are not there for 512 threads
    ],
)
def test_registers_instead_of_spills(config, registers, spills, relaxed):
    found = tune.resized(parse(config), build(registers=registers, spills=spills), 90)
    assert found == (parse(config).replace(max_regs=255) if relaxed else None)


def test_builds_are_remembered(tmp_path, monkeypatch):
    """A job in the file is not compiled again, for its architecture alone."""
    file, asked = tmp_path / "builds.jsonl", []

    class Now:
        def __init__(self, *_, **__):
            pass

        def submit(self, function, job, arch):
            asked.append((job, arch))
            return self

        def result(self, timeout):
            job, _ = asked[-1]
            if timeout == 0.0:
                raise TimeoutError
            return {job: build(spills=8) if job[2].num_warps == 8 else "AssertionError: no"}

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Now)
    jobs = [("fwd", D64, parse(text)) for text in ("64x64 w8 s2", "64x64 w4 s2")]
    first = tune.Builds(file, 90, 1)
    assert [first.of(job) for job in jobs] == [build(spills=8), "AssertionError: no"]
    again = tune.Builds(file, 90, 1)
    assert [again.of(job) for job in jobs] == [build(spills=8), "AssertionError: no"]
    assert len(asked) == 2
    late = tune.Builds(file, 80, 1)
    late.deadline = 0.0
    assert late.of(jobs[0]) == "not compiled in time"
    assert asked[-1] == (jobs[0], 80)
    late.deadline = float("inf")
    assert late.of(jobs[0]) == build(spills=8)
    assert len(asked) == 3


def test_what_spills_is_not_raced():
    builds = tune.Builds(Path("none"), 90, 1)
    fine, spilling, broken = (parse(f"64x64 w4 s{n}") for n in (1, 2, 3))
    tight = fine.replace(max_regs=168)
    results = {
        fine: build(registers=177),
        spilling: build(registers=255, spills=8),
        broken: "no",
        tight: build(registers=168),
    }
    builds.known = {("fwd", D64, config): result for config, result in results.items()}
    assert builds.usable("fwd", D64, [fine, spilling, broken]) == [fine, tight]


def test_the_fastest_ran_every_length():
    records = raced(
        ("64x64 w4 s2", {512: 9.0, 2048: 1.0, 8192: 4.0}),
        ("64x64 w4 s3", {512: 1.0, 2048: 1.0, 8192: 9.0}),
        ("64x64 w8 s2", {2048: 0.1}),
    )
    slow, quick = parse("64x64 w4 s3"), parse("64x64 w4 s2")
    assert list(tune.means(records, short=False).items()) == [(quick, pytest.approx(2.0)), (slow, pytest.approx(3.0))]
    assert list(tune.means(records, short=True)) == [slow, quick]
    assert tune.means([], short=False) == {}


def rows_of(winners: dict) -> list[tuple[str, ...]]:
    """(kernel, classes, block_d, work, configuration, comment) of each row."""
    parts = [line.partition("#") for line in tune.rows(winners, 90)]
    return [(*row.split(maxsplit=4)[:4], parse(row.split(maxsplit=4)[4]), comment) for row, _, comment in parts]


def test_rows_for_the_table(monkeypatch):
    """A row parses as the table's, says what it gains, and parts dk from dv where that is faster."""
    now = parse("64x64 w4 s2 tma")
    monkeypatch.setattr(configs, "table", lambda arch: {("dkdv", "bf16", 256, "full"): now})
    best = {"dkdv": "32x64 w8 s2 tma", "dk": "64x64 w4 s2 tma", "dv": "64x128 w8 s2 tma"}
    for dv, split in ((1.0, True), (2.5, False)):
        winners = {
            ("dkdv", D256): raced((best["dkdv"], {2048: 3.0}), (str(now), {2048: 3.3})),
            ("dk", D256): raced((best["dk"], {2048: 1.5})),
            ("dv", D256): raced((best["dv"], {2048: dv})),
        }
        for kernel, classes, block_d, work, config, comment in (found := rows_of(winners)):
            assert (classes, block_d, work) == ("bf16,fp16", "256", "full")
            assert config == parse(best[kernel]).replace(split=split and kernel == "dkdv")
            assert ("1.100x faster" in comment) == (kernel == "dkdv")
        assert [row[0] for row in found] == ["dkdv", "dk", "dv"]


def test_a_short_row_is_compared_with_the_short_row_there_is(monkeypatch):
    rows = "fwd bf16 64 masked 64x128 w4 s2\nfwd bf16 64 masked/short 64x64 w4 s2\nfwd bf16 64 full 32x64 w4 s2"
    monkeypatch.setattr(configs, "table", lambda arch: configs.parse_rows(rows))
    problem = Problem(heads_q=1, seq_q=512, head_dim=64, dtype="bf16", causal=True)
    now = [
        str(tune.present("fwd", p, 90, short=short))
        for p in (problem, problem.replace(causal=False))
        for short in (False, True)
    ]
    assert now == ["64x128 w4 s2", "64x64 w4 s2", "32x64 w4 s2", "32x64 w4 s2"]


def test_a_row_for_short_problems_where_it_pays():
    long, short = "64x128 w4 s2 tma", "64x64 w4 s2 tma"
    for at_512, pays in ((1.03, True), (1.01, False)):
        winners = {("fwd", D256): raced((long, {512: at_512, 2048: 1.0}), (short, {512: 1.0, 2048: 2.0}))}
        assert [(row[3], str(row[4])) for row in rows_of(winners)] == [("full", long), ("full/short", short)][
            : 1 + pays
        ]


HANGS = "64x128 w4 s3 tma"


class NoGPU:
    """A worker whose kernels are right and take a time that depends on their tile; one of them hangs."""

    def ask(self, method, *arguments, seconds=0.0):
        if method == "rivals":
            return {"sdpa-flash": (1.0, 2.5)}
        if method == "race":
            _, problem, some, _ = arguments
            return [problem.seq_q / (config.block_m * config.block_n) for config in some]
        if str(arguments[2]) == HANGS:
            raise tune.Hang("no answer within 30 s")
        return 1e-3

    def stop(self):
        pass


def test_a_whole_sweep(tmp_path, monkeypatch, capsys):
    """Every cell's records are written as they come, and the rows stand at the end."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "nobody's")
    monkeypatch.setattr(tune, "Worker", NoGPU)
    monkeypatch.setattr(tune.Builds, "start", lambda self, jobs: None)
    monkeypatch.setattr(tune.Builds, "of", lambda self, job: build(registers=128))
    out = tmp_path / "tune.jsonl"
    assert (
        tune.main(
            [
                "--cells",
                "fwd/bf16/64/full,causal/1",
                "--cells",
                "dq/tf32/64/full/0",
                "--seqlen",
                "2048,512",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    table = [line.split("#")[0].split(maxsplit=4) for line in printed.splitlines() if line.startswith("        ")]
    assert [row[:4] for row in table] == [
        ["fwd", "bf16,fp16", "64", "full"], ["fwd", "bf16,fp16", "64", "masked"], ["dq", "tf32", "64", "full"],
    ]  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["kernel"] for line in lines if "kernel" in line} == {"fwd", "dq"}
    assert sum("rivals_ms" in line for line in lines) == 6
    assert {line["config"] for line in lines if line.get("reason")} == {HANGS}
    raced = [line for line in lines if line.get("final")]
    assert all(set(line["ms"]) == {"2048", "512"} for line in raced)


def test_a_sweep_stops_at_its_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "nobody's")
    monkeypatch.setattr(tune, "Worker", NoGPU)
    monkeypatch.setattr(tune.Builds, "start", lambda self, jobs: None)
    assert tune.main(["--cells", "fwd/bf16/64/full/0", "--budget", "-1", "--out", str(tmp_path / "tune.jsonl")]) == 0
    assert "budget spent before fwd bf16 d64 full" in capsys.readouterr().out
