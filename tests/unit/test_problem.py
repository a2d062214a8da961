"""Problem: exact counts against brute force, names and dicts that round-trip, every refusal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash2 import Problem
from flash2.core.problem import DTYPE_BYTES, PASSES, PRECISIONS, SIZE_LIMIT

ends = st.one_of(st.none(), st.integers(0, 14))
windows = st.one_of(st.none(), st.tuples(ends, ends))


@st.composite
def problems(draw) -> Problem:
    heads_kv = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(sorted(PRECISIONS)))
    return Problem(
        batch=draw(st.integers(0, 3)),
        heads_q=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        seq_q=draw(st.integers(0, 9)),
        seq_kv=draw(st.integers(0, 9)),
        head_dim=draw(st.integers(1, 9)),
        dtype=dtype,
        precision=draw(st.sampled_from(PRECISIONS[dtype])),
        causal=draw(st.booleans()),
        window=draw(windows),
        softcap=draw(st.sampled_from([0.0, 1.5, 30.0])),
        alibi=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.1, 1 / 3, -2.0])),
        pass_=draw(st.sampled_from(PASSES)),
    )


def visible(problem: Problem) -> int:
    """Pairs counted one by one from the definition, not from `band`."""
    count = 0
    for i in range(problem.seq_q):
        place = i + problem.seq_kv - problem.seq_q
        for j in range(problem.seq_kv):
            hidden = problem.causal and j > place
            if problem.window is not None:
                left, right = problem.window
                hidden |= left is not None and j < place - left
                hidden |= right is not None and j > place + right
            count += not hidden
    return count


@given(problems())
def test_pairs_are_counted_exactly(problem):
    assert problem.pairs == visible(problem)


def test_pairs_at_lengths_beyond_counting():
    problem = Problem(seq_q=1 << 20, head_dim=64, causal=True)
    assert problem.pairs == (1 << 20) * ((1 << 20) + 1) // 2
    assert problem.replace(window=(1023, None)).pairs == (1 << 20) * 1024 - 1024 * 1023 // 2


@given(problems())
def test_dict_and_key_round_trip(problem):
    fields = json.loads(json.dumps(problem.to_dict()))
    assert Problem.from_dict(fields) == problem
    assert hash(Problem.from_dict(fields)) == hash(problem)


@given(problems(), problems())
def test_keys_differ_where_problems_do(one, other):
    assert (one.key() == other.key()) == (one == other)
    if one.replace(dtype="fp32", precision="ieee", pass_="fwd") == other.replace(
        dtype="fp32", precision="ieee", pass_="fwd"
    ):
        assert one.shape_key() == other.shape_key()


def test_key_reads_well():
    problem = Problem(batch=2, heads_q=32, heads_kv=8, seq_q=512, seq_kv=1024, head_dim=64, causal=True, dtype="bf16")
    assert problem.key() == "b2-h32/8-n512x1024-d64-causal-bf16-bf16-fwd"
    assert (
        Problem(seq_q=8, head_dim=4, window=(3, None), softcap=2.5, alibi=True).shape_key()
        == "b1-h1-n8-d4-w3:-cap2.5-alibi"
    )


def test_defaults():
    problem = Problem(heads_q=6, seq_q=5, head_dim=8)
    assert (problem.heads_kv, problem.seq_kv, problem.precision, problem.pass_) == (6, 5, "ieee", "fwd")


@pytest.mark.parametrize(("pass_", "matmuls"), [("fwd", 2), ("bwd", 5), ("fwd+bwd", 7)])
def test_flops_and_bytes(pass_, matmuls):
    problem = Problem(batch=2, heads_q=4, heads_kv=2, seq_q=8, seq_kv=16, head_dim=32, dtype="bf16", pass_=pass_)
    assert problem.flops == 2 * matmuls * 2 * 4 * 8 * 16 * 32
    q, kv, lse = 2 * 4 * 8 * 32 * DTYPE_BYTES["bf16"], 2 * 2 * 16 * 32 * DTYPE_BYTES["bf16"], 2 * 4 * 8 * 4
    forward = q + 2 * kv + q + lse  # reads q, k, v; writes o, lse
    backward = 3 * q + 2 * kv + lse + q + 2 * kv  # reads q, o, do, k, v, lse; writes dq, dk, dv
    assert problem.bytes == {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]


def test_the_seeds_formula():
    """4 * batch * heads * seq^2 * head_dim for a dense forward, 2.5 times that for its backward."""
    problem = Problem(batch=4, heads_q=32, seq_q=4096, head_dim=64, dtype="bf16")
    assert problem.flops == 4 * 4 * 32 * 4096 * 4096 * 64
    assert problem.replace(pass_="bwd").flops == 2.5 * problem.flops


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: fp64, fp32, fp16, bf16"),
        ({"dtype": "bf16", "precision": "tf32"}, "'tf32' is no class of bf16; it has: bf16"),
        ({"dtype": "fp32", "precision": "fast"}, "'fast' is no class of fp32; it has: ieee, tf32"),
        ({"batch": -1}, "batch must be an integer from 0"),
        ({"seq_q": -1}, "seq_q must be an integer from 0"),
        ({"seq_kv": SIZE_LIMIT}, "seq_kv must be an integer from 0 to 2147483647, not 2147483648"),
        ({"head_dim": 0}, "head_dim must be an integer from 1"),
        ({"heads_q": 0}, "heads_q must be an integer from 1"),
        ({"heads_kv": 0}, "heads_kv must be an integer from 1"),
        ({"seq_q": 2.0}, "seq_q must be an integer"),
        ({"batch": True}, "batch must be an integer"),
        ({"heads_q": 6, "heads_kv": 4}, "heads_q 6 is not a multiple of heads_kv 4"),
        ({"pass_": "both"}, "unknown pass 'both'; known: fwd, bwd, fwd"),
        ({"window": (1,)}, "window must be"),
        ({"window": (-1, 2)}, "window must be"),
        ({"window": (1.5, 2)}, "window must be"),
        ({"window": 4}, "window must be"),
        ({"softcap": -1.0}, "softcap must be finite and >= 0"),
        ({"softcap": float("nan")}, "softcap must be finite"),
        ({"scale": float("inf")}, "scale must be finite"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError) as caught:
        Problem(**{"seq_q": 8, "head_dim": 8, **fields})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seq_q": 1, "head_dim": 1, "sequence": 2}, "unknown problem field 'sequence'; known: alibi, batch"),
        ({"seq_q": 1}, "problem lacks 'head_dim'"),
        ({"head_dim": 1}, "problem lacks 'seq_q'"),
    ],
)
def test_a_bad_dict_is_refused(fields, says):
    with pytest.raises(ValueError) as caught:
        Problem.from_dict(fields)
    assert says in str(caught.value)


def test_a_problem_is_frozen():
    with pytest.raises(AttributeError):
        Problem(seq_q=1, head_dim=1).seq_q = 2
