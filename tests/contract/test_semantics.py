"""What attention means: golden values by hand, masks, empty rows, NaN, groups, features, empty tensors."""

from __future__ import annotations

import math

import pytest
import torch
from judged import Case

from flash2.core.inputs import Inputs, make_inputs

few = pytest.mark.few_shapes


@few
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_golden_two_by_two(case: Case, causal):
    """Logits 0 and ln 3, values 4 and 8: a row that sees both keys weighs them 1/4 and 3/4. All of it by hand."""
    if case.backend.compiles_per_shape and (causal or case.precision == "fp16"):
        pytest.skip("two of the six golden problems do for a backend that compiles each for seconds")
    problem = case.problem(seq_q=2, seq_kv=2, head_dim=16, causal=causal, scale=1.0)
    log3 = math.log(3.0)
    q, k, v, do = (torch.zeros(1, 1, 2, 16, dtype=case.dtype, device=case.device) for _ in range(4))
    q[..., 0], do[..., 0] = 1.0, 1.0
    k[0, 0, 1, 0] = log3
    v[0, 0, :, 0] = torch.tensor([4.0, 8.0])
    out = case.run(problem, Inputs(q, k, v, do))
    # dp = (4, 8), delta = 7, ds = p * (dp - delta) = (-3/4, 3/4) for each row that sees both keys.
    want = {"o": [4, 7], "lse": [0, math.log(4)], "dq": [0, 0.75 * log3], "dk": [-0.75, 0.75], "dv": [1.25, 0.75]}
    if not causal:
        want = {"o": [7, 7], "lse": [math.log(4)] * 2, "dq": [0.75 * log3] * 2, "dk": [-1.5, 1.5], "dv": [0.5, 1.5]}
    for name, got in out.items():
        column = got[0, 0] if name == "lse" else got[0, 0, :, 0]
        expected = torch.tensor(want[name], dtype=torch.float64)
        assert torch.allclose(column.double().cpu(), expected, rtol=8 * case.roundoff, atol=16 * case.roundoff), name
        if name != "lse":
            assert got[..., 1:].abs().max() <= 16 * case.roundoff, name


# (seq_q, seq_kv, how), and for each row the keys it sees, written out by hand.
VISIBLE = [
    (3, 3, {"causal": True}, ["0", "01", "012"]),
    (2, 4, {"causal": True}, ["012", "0123"]),
    (4, 2, {"causal": True}, ["", "", "0", "01"]),
    (1, 4, {"causal": True}, ["0123"]),
    (4, 1, {"causal": True}, ["", "", "", "0"]),
    (4, 4, {"window": (1, 0)}, ["0", "01", "12", "23"]),
    (4, 4, {"window": (0, 1)}, ["01", "12", "23", "3"]),
    (3, 3, {"window": (None, 1)}, ["01", "012", "012"]),
    (3, 3, {"window": (1, None)}, ["012", "012", "12"]),
    (3, 5, {"window": (1, 1)}, ["123", "234", "34"]),
    (5, 3, {"window": (1, 0)}, ["", "", "0", "01", "12"]),
    (5, 3, {"window": (None, 1)}, ["", "0", "01", "012", "012"]),
    (4, 4, {"causal": True, "window": (2, 3)}, ["0", "01", "012", "123"]),
    (3, 5, {"causal": True, "window": (0, None)}, ["2", "3", "4"]),
    (3, 3, {"window": (9, 9)}, ["012", "012", "012"]),
]


@pytest.mark.parametrize(
    ("seq_q", "seq_kv", "how", "rows"),
    [pytest.param(*visible, id=f"{visible[0]}x{visible[1]}-{visible[2]}") for visible in VISIBLE],
)
def test_visible_keys(any_case: Case, seq_q, seq_kv, how, rows):
    """Equal logits and one-hot values: row i of o is 1/n at each of the n keys it sees. Bottom-right aligned."""
    problem = any_case.problem(seq_q=seq_q, seq_kv=seq_kv, head_dim=16, heads_q=2, batch=2, **how)
    like = {"dtype": any_case.dtype, "device": any_case.device}
    q, do = torch.zeros(2, 2, seq_q, 16, **like), torch.ones(2, 2, seq_q, 16, **like)
    k, v = torch.zeros(2, 2, seq_kv, 16, **like), torch.eye(seq_kv, 16, **like).expand(2, 2, -1, -1)
    out = any_case.run(problem, Inputs(q, k, v, do))
    for i, keys in enumerate(rows):
        want = torch.zeros(16, dtype=torch.float64)
        for key in keys:
            want[int(key)] = 1 / len(keys)
        assert torch.allclose(out["o"][:, :, i].double().cpu(), want, atol=4 * any_case.roundoff), f"row {i}"
        if "lse" in out:
            seen = torch.tensor(float(len(keys))).log()
            assert torch.allclose(out["lse"][:, :, i].cpu().float(), seen, atol=1e-5), f"lse of row {i}"
    if "dv" in out:  # do = 1: every key receives the sum of its weights
        for j in range(seq_kv):
            want = sum(1 / len(keys) for keys in rows if str(j) in keys)
            got = out["dv"][:, :, j].double().cpu()
            assert torch.allclose(got, torch.full_like(got, want), rtol=8 * any_case.roundoff), f"dv of key {j}"


@few
def test_empty_rows(any_case: Case):
    """A row that sees no key: o = 0, lse = -inf, zero gradients, no NaN; the others are right."""
    out = any_case.judge(any_case.problem(seq_q=70, seq_kv=5, head_dim=16, heads_q=2, batch=2, causal=True))
    assert out["o"][:, :, :65].count_nonzero() == 0
    if "lse" in out:
        assert (out["lse"][:, :, :65] == -torch.inf).all()
    if "dq" in out:
        assert out["dq"][:, :, :65].count_nonzero() == 0
        assert not any(out[name].isnan().any() for name in ("dq", "dk", "dv"))


def test_window_that_some_rows_fall_out_of(any_case: Case):
    """A band that leaves rows empty at the top and far keys unseen, forward and backward."""
    any_case.judge(any_case.problem(seq_q=65, seq_kv=33, head_dim=16, window=(7, 2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_hidden_values_reach_nothing(any_case: Case, where, bad):
    """Keys past the causal edge hold NaN or Inf: rows that do not see them are what they were, to a few roundings."""
    if not any_case.has("hidden-nan"):
        pytest.skip(f"{any_case.backend.name} does not declare hidden-nan")
    problem = any_case.problem(seq_q=40, seq_kv=40, head_dim=16, heads_q=2, causal=True, pass_="fwd")
    inputs = make_inputs(problem, device=any_case.device)
    clean = any_case.run(problem, inputs)["o"]
    getattr(inputs, where)[:, :, 30:] = bad
    out = any_case.run(problem, inputs)["o"]
    roundings = 8 * any_case.roundoff * float(clean.abs().max())
    assert torch.allclose(out[:, :, :30], clean[:, :, :30], rtol=0, atol=roundings)
    if math.isnan(bad):
        assert out[:, :, 30:].isnan().all()


@pytest.mark.parametrize("where", ["k", "v"])
def test_keys_hidden_from_all_reach_nothing(any_case: Case, where):
    """NaN in keys left of every row's window changes nothing, gradients included, whatever the backend declares."""
    problem = any_case.problem(seq_q=8, seq_kv=40, head_dim=16, causal=True, window=(3, 0))
    inputs = make_inputs(problem, device=any_case.device)
    clean = any_case.run(problem, inputs)
    getattr(inputs, where)[:, :, :29] = torch.nan  # row 0 sits at key 32 and sees 29 to 32
    for name, x in any_case.run(problem, inputs).items():
        assert torch.equal(x, clean[name]), name


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_visible_nan_reaches_exactly_its_rows(any_case: Case, where):
    """A NaN that is seen is never swallowed, and reaches no row, head or batch element that does not see it."""
    if not any_case.has("hidden-nan"):
        pytest.skip(f"{any_case.backend.name} does not declare hidden-nan")
    problem = any_case.problem(seq_q=12, seq_kv=12, head_dim=16, heads_q=2, batch=2, causal=True, pass_="fwd")
    inputs = make_inputs(problem, device=any_case.device)
    getattr(inputs, where)[0, 1, 7, 3] = torch.nan
    nan = any_case.run(problem, inputs)["o"].isnan().any(-1)
    want = torch.zeros(2, 2, 12, dtype=torch.bool, device=any_case.device)
    want[0, 1, 7 : 8 if where == "q" else None] = True
    assert torch.equal(nan, want)


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(1, 1), (2, 1), (6, 2), (3, 1), (8, 1), (16, 2)])
def test_grouped_heads(any_case: Case, heads_q, heads_kv):
    """Groups of 1, 2, 3 and 8 query heads share a key/value head, whose gradients are sums over the group."""
    any_case.judge(
        any_case.problem(seq_q=19, seq_kv=35, head_dim=16, heads_q=heads_q, heads_kv=heads_kv, batch=2, causal=True)
    )


@pytest.mark.parametrize(
    "how",
    [
        {"softcap": 3.0},
        {"alibi": True},
        {"alibi": True, "causal": True},
        {"scale": 0.7},
        {"scale": -0.3},
        {"scale": 0.0},
        pytest.param({"softcap": 2.0, "alibi": True, "window": (9, 4), "scale": 0.4}, marks=[few]),
    ],
    ids=str,
)
def test_score_options(any_case: Case, how):
    """softcap, ALiBi and the scale, alone and together, with fewer queries than keys and grouped heads."""
    any_case.judge(any_case.problem(seq_q=21, seq_kv=30, head_dim=16, heads_q=4, heads_kv=2, **how))


def test_alibi_slopes_per_batch(any_case: Case):
    """Slopes of shape (batch, heads_q) are those of shape (heads_q,) element by element."""
    problem = any_case.problem(seq_q=9, seq_kv=9, head_dim=16, heads_q=2, batch=2, alibi=True, pass_="fwd")
    inputs = make_inputs(problem, device=any_case.device)
    slopes = torch.tensor([[0.1, 0.2], [0.3, 0.4]], device=any_case.device)
    both = any_case.attention(inputs.q, inputs.k, inputs.v, problem, slopes=slopes)
    for b in range(2):
        one = [x[b : b + 1] for x in (inputs.q, inputs.k, inputs.v)]
        alone = any_case.attention(*one, problem, slopes=slopes[b])
        assert torch.allclose(both[b : b + 1], alone, atol=8 * any_case.roundoff)


def test_lse_is_natural_and_wide(case: Case):
    """lse is the natural logarithm, in float32 (fp64: float64), for small and for large logits."""
    if not case.has("lse"):
        pytest.skip(f"{case.backend.name} has no lse")
    problem = case.problem(seq_q=17, seq_kv=40, head_dim=16, heads_q=2, scale=1.0, pass_="fwd")
    inputs = make_inputs(problem, device=case.device)
    lse = case.run(problem, inputs)["lse"]
    want = (inputs.q.double() @ inputs.k.double().mT).logsumexp(-1)
    assert lse.dtype == torch.promote_types(case.dtype, torch.float32)
    assert torch.allclose(lse.double(), want, atol=64 * max(case.roundoff if case.precision == "tf32" else 0, 2**-24))


@few
@pytest.mark.parametrize(("batch", "seq_q", "seq_kv"), [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)])
def test_empty_tensors(any_case: Case, batch, seq_q, seq_kv):
    """No query, no key or no batch: outputs of the right shape, zeros where there is a row, zero gradients."""
    problem = any_case.problem(seq_q=seq_q, seq_kv=seq_kv, batch=batch, heads_q=2, head_dim=16)
    inputs = make_inputs(problem, device=any_case.device)
    out = any_case.run(problem, inputs)
    assert out["o"].shape == inputs.q.shape
    assert out["o"].dtype == inputs.q.dtype
    assert out["o"].count_nonzero() == 0
    if "lse" in out:
        assert out["lse"].shape == inputs.q.shape[:3]
        assert (out["lse"] == -torch.inf).all()
    for name, like in (("dq", inputs.q), ("dk", inputs.k), ("dv", inputs.v)):
        if name in out:
            assert out[name].shape == like.shape
            assert out[name].count_nonzero() == 0
