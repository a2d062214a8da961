"""backend="auto": what it picks of which table, what it says, what it never does; and the table's making."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import flash2
from flash2 import attention, get_backend
from flash2.core import auto
from flash2.core.auto import Auto, Row, Table
from flash2.core.compare import Quantiles
from flash2.core.contract import Backend, Capability
from flash2.core.problem import Problem
from flash2.core.results import Result, read_results

CPU = torch.device("cpu")
ROOT = Path(flash2.__file__).parent


class Fake(Backend):
    """Computes nothing; says what it lacks."""

    def __init__(self, name, lacks="", missing=None, lse=True, settled=True):
        self.name, self.lacks, self.missing, self.settled = name, lacks, missing, settled
        features = frozenset({"causal", "window", "lse"}) if lse else frozenset({"causal", "window"})
        self.capability = Capability(devices=("cpu", "cuda"), precisions={"fp32": ("ieee",)}, features=features)
        self.asked = 0

    def unavailable(self):
        return self.missing

    def why_not(self, problem, device):
        self.asked += 1
        return [self.lacks] if self.lacks else []

    def details(self, problem, device):
        return [f"{self.name} in tiles of 7"]

    def forward(self, q, k, v, spec):
        return torch.full_like(q, len(self.name)), torch.zeros(q.shape[:3])

    def backward(self, do, q, k, v, o, lse, spec):
        return do * 2, do * 3, do * 4


def chooser(*backends, measured=None, assumed=None):
    """An Auto over these; unknown names raise as the shelf does."""
    known = {backend.name: backend for backend in backends}

    def find(name, device_type):
        if name not in known:
            raise ValueError(f"unknown backend {name!r}; known: {', '.join(known)}")
        return known[name]

    return Auto(Table({"assumed": assumed or {"cpu": list(known)}, "measured": measured or {}}), find)


PROBLEM = Problem(seq_q=1024, head_dim=64)


def row(order, **changed):
    what = {"precision": "ieee", "pass_": "fwd", "mask": "full", "head_dim": 64, "seq": 1024, **changed}
    return list(Row(order=order, **what))


def test_the_first_that_can_is_picked():
    picked = chooser(Fake("a", lacks="no luck"), Fake("b", missing="not installed"), Fake("c"), Fake("d"))
    assert picked.pick(PROBLEM, CPU).name == "c"
    assert picked.why_not(PROBLEM, CPU) == []
    assert picked.details(PROBLEM, CPU) == [
        "c, an assumed order: nothing was measured for ieee fwd on cpu", "not a: no luck", "not b: not installed",
        "c in tiles of 7",
    ]  # fmt: skip


def test_nobody_can():
    picked = chooser(Fake("a", lacks="no luck"), Fake("b", missing="not installed"), assumed={"cpu": ["a", "b", "z"]})
    assert picked.why_not(PROBLEM, CPU) == ["a: no luck", "b: not installed", "z: unknown backend 'z'"]
    assert picked.details(PROBLEM, CPU) == ["not a: no luck", "not b: not installed", "not z: unknown backend 'z'"]
    with pytest.raises(NotImplementedError, match=r"nobody can run .*: a: no luck; b: not installed; z: unknown"):
        picked.pick(PROBLEM, CPU)
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match=r"'auto' cannot run .*a: no luck; b: not installed"):
        attention(x, x, x, backend=picked)


def test_what_was_measured_goes_before_what_is_assumed():
    measured = {"cpu": [row(["c", "b"])]}
    picked = chooser(Fake("a"), Fake("b"), Fake("c"), measured=measured)
    assert picked.pick(PROBLEM, CPU).name == "c"
    assert picked.details(PROBLEM, CPU)[0] == "c, measured on cpu: ieee fwd full d64 n1024"
    picked = chooser(Fake("a"), Fake("b", lacks="x"), Fake("c", lacks="y"), measured=measured)
    assert picked.pick(PROBLEM, CPU).name == "a"


@pytest.mark.parametrize(
    ("problem", "best"),
    [
        (PROBLEM, "full-1k"),
        (PROBLEM.replace(seq_q=600, seq_kv=600), "full-1k"),
        (PROBLEM.replace(seq_q=7000, seq_kv=7000), "full-8k"),
        (PROBLEM.replace(causal=True), "causal-1k"),
        (PROBLEM.replace(window=(9, 0)), "full-1k"),
        (PROBLEM.replace(head_dim=200), "full-d256"),
        (PROBLEM.replace(pass_="fwd+bwd"), "train"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.key(),
)
def test_the_nearest_row_counts(problem, best):
    rows = [
        row(["full-1k"]), row(["full-8k"], seq=8192), row(["causal-1k"], mask="causal"),
        row(["full-d256"], head_dim=256), row(["train"], pass_="fwd+bwd"), row(["other"], precision="tf32"),
    ]  # fmt: skip
    picked = chooser(*(Fake(r[-1][0]) for r in rows), measured={"cpu": rows})
    assert picked.pick(problem, CPU).name == best


@pytest.mark.parametrize(("arch", "first"), [((9, 0), "hopper"), ((8, 0), "any")])
def test_a_device_class_has_an_order_of_its_own(monkeypatch, arch, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: arch)
    picked = chooser(Fake("hopper"), Fake("any"), assumed={"sm_90": ["hopper", "any"], "cuda": ["any", "hopper"]})
    assert picked.pick(PROBLEM, torch.device("cuda")).name == first


def test_an_lse_is_asked_of_those_that_have_it():
    picked = chooser(Fake("a", lse=False), Fake("bb"))
    x = torch.zeros(1, 1, 4, 4)
    assert attention(x, x, x, backend=picked).unique() == 1
    o, lse = attention(x, x, x, backend=picked, return_lse=True)
    assert o.unique() == 2
    assert lse is not None


def test_gradients_are_those_of_the_one_that_is_picked():
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    y = torch.zeros(1, 1, 4, 4, requires_grad=True)
    attention(x, y, y, backend=chooser(Fake("a"))).sum().backward()
    assert x.grad.unique() == 2
    assert y.grad.unique() == 7


def test_a_pick_is_remembered_while_nothing_can_change_it():
    settled, other = Fake("a", lacks="never"), Fake("b")
    picked = chooser(settled, other)
    x = torch.zeros(1, 1, 4, 4)
    for _ in range(3):
        attention(x, x, x, backend=picked)
    before = settled.asked
    attention(x, x, x, backend=picked)
    assert settled.asked == before
    moody = Fake("a", lacks="not now", settled=False)
    picked = chooser(moody, other)
    attention(x, x, x, backend=picked)
    moody.lacks, moody.name = "", "moody"
    assert attention(x, x, x, backend=picked).unique() == len("moody")


def test_by_name_it_computes_what_naive_does():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in range(3))
    for options in ({"causal": True}, {"softcap": 5.0}, {"window": (9, 3)}, {"precision": "ieee"}):
        options = {"scale": 0.3, **options}
        o, lse = attention(q, k, v, backend="auto", return_lse=True, **options)
        want, want_lse = attention(q, k, v, backend="naive", return_lse=True, **options)
        assert torch.allclose(o, want, atol=1e-5)
        assert torch.allclose(lse, want_lse, atol=1e-5)
        do = torch.randn_like(o)
        for mine, naive in zip(
            torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True
        ):
            assert torch.allclose(mine, naive, atol=1e-5)


def test_it_never_picks_what_refuses():
    """Whatever the problem, the one that is picked has nothing against it."""
    for dtype, head_dim, fields in [
        ("fp64", 16, {}), ("bf16", 300, {}), ("fp32", 64, {"alibi": True, "softcap": 3.0}), ("fp16", 5, {"window": (3, 3)}),
        ("fp32", 64, {"seq_kv": 7, "causal": True}), ("fp32", 1000, {"softcap": 1.0}),
    ]:  # fmt: skip
        for pass_ in ("fwd", "bwd", "fwd+bwd"):
            problem = Problem(**{"seq_q": 33, "head_dim": head_dim, "dtype": dtype, "pass_": pass_, **fields})
            picked = get_backend("auto").pick(problem, CPU)
            assert picked.unavailable() is None
            assert picked.why_not(problem, CPU) == []


# ---- the table


def result(backend, ms, arch=None, status="ok", **fields):
    problem = Problem(**{"seq_q": 512, "head_dim": 64, **fields})
    return Result(
        backend=backend, problem=problem, status=status, reason="" if status == "ok" else "bad",
        ms=Quantiles(ms, ms, ms), tflops=1.0 if status == "ok" else None, environment={"arch": arch} if arch else {},
    )  # fmt: skip


def test_rows_are_sorted_by_time():
    rows = auto.rows_of([
        result("sdpa", 2.0), result("numba", 1.0), result("naive", 0.5), result("flex", 0.1),
        result("sdpa", 1.0, pass_="bwd"), result("numba", 3.0, pass_="bwd"), result("triton", 0.2, status="wrong"),
    ])  # fmt: skip
    assert rows == {
        "cpu": [
            Row("ieee", "bwd", "full", 64, 512, ["sdpa", "numba"]),
            Row("ieee", "fwd", "full", 64, 512, ["numba", "sdpa"]),
            Row("ieee", "fwd+bwd", "full", 64, 512, ["sdpa", "numba"]),
        ]
    }


def test_problems_of_one_kind_count_equally():
    """One problem that takes long does not outvote two others."""
    rows = auto.rows_of(
        result(name, ms, arch="sm_90", batch=batch)
        for batch, triton, sdpa in [(1, 1.0, 2.0), (2, 1.0, 2.0), (64, 300.0, 200.0)]
        for name, ms in (("triton", triton), ("sdpa", sdpa))
    )
    assert rows["sm_90"][0].order == ["triton", "sdpa"]


def test_a_comparison_without_our_kernels_is_no_row():
    assert auto.rows_of([result("sdpa", 1.0), result("sdpa-flash", 2.0)]) == {}
    assert auto.rows_of([result("numba", 1.0)]) == {}


def test_the_table_in_the_package_is_what_its_results_say():
    files = json.loads(auto.TABLE.read_text())["from"]
    text = auto.written([Path(name) for name in files], root=ROOT)
    assert text == auto.TABLE.read_text(), "run: python -m flash2.core.auto docs/results/*/*.jsonl"
    measured = {r.backend for name in files for r in read_results(ROOT / name)}
    assert "numba" in measured
    for names in auto.ASSUMED.values():
        assert names[-1] == "naive"
