"""Every output is as exact as its class of maths allows: lengths, head dims, magnitudes, drawn problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judged import DTYPE_OF, Case, judged
from strategies import HEAD_DIMS, LENGTHS, distributions, layouts, problems, upstreams

from flash2.core.inputs import DISTRIBUTIONS, make_inputs


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_tiles(any_case: Case, length):
    """As queries, as keys and as both; causal, so that the diagonal crosses tiles at every offset."""
    shape = {"head_dim": 32, "heads_q": 2, "causal": True}
    any_case.judge(any_case.problem(seq_q=length, seq_kv=length, **shape))
    any_case.judge(any_case.problem(seq_q=length, seq_kv=97, **shape))
    any_case.judge(any_case.problem(seq_q=33, seq_kv=max(length, 33), **shape))
    any_case.judge(any_case.problem(seq_q=5, seq_kv=length, head_dim=32, heads_q=2))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(case: Case, head_dim):
    """Head dims that are odd, no powers of two, or large."""
    case.judge(case.problem(seq_q=33, seq_kv=40, head_dim=head_dim, heads_q=2, causal=True))


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_magnitudes(case: Case, distribution):
    """Inputs of 0.5, 1, 3 and 10 standard deviations, needles, logits near -200, and logits of -3e5 and +3e5."""
    case.judge(case.problem(seq_q=70, seq_kv=129, head_dim=64, heads_q=2, causal=True), distribution=distribution)


@given(data=st.data())
@settings(max_examples=12)
def test_drawn_problems(case: Case, data):
    """Any declared combination of options, layout, upstream gradient and distribution."""
    capability = case.backend.capability_on(case.device)
    problem = data.draw(problems(capability, DTYPE_OF[case.precision], case.precision))
    assume(not case.backend.why_not(problem, case.device))
    how = {"layout": data.draw(layouts), "upstream": data.draw(upstreams), "distribution": data.draw(distributions)}
    case.judge(problem, **how)


def test_many_shapes_in_one_process(case: Case):
    """Shapes, masks and layouts in turn and again: nothing that is kept between calls goes stale."""
    shapes = [
        {"seq_q": 64, "seq_kv": 64, "head_dim": 64, "heads_q": 2},
        {"seq_q": 65, "seq_kv": 64, "head_dim": 32, "heads_q": 2, "heads_kv": 1, "causal": True},
        {"seq_q": 1, "seq_kv": 200, "head_dim": 64, "heads_q": 2},
        {"seq_q": 64, "seq_kv": 64, "head_dim": 64, "heads_q": 2, "causal": True},
    ]
    for number in range(2 * len(shapes)):
        layout = "bshd" if number >= len(shapes) else "bhsd"
        case.judge(case.problem(**shapes[number % len(shapes)]), layout=layout, seed=number)


def test_batch_times_heads(any_case: Case):
    """More (batch, head) pairs than a grid axis holds (65,535) on CUDA, in batch and in heads; fewer on the CPU."""
    many = 70_000 if any_case.device.type == "cuda" else 2_000
    ran = 0
    for fields in ({"batch": many}, {"heads_q": many}, {"batch": many // 4, "heads_q": 4, "heads_kv": 2}):
        try:
            problem = any_case.problem(seq_q=3, seq_kv=5, head_dim=16, causal=True, **fields)
        except pytest.skip.Exception:
            continue  # refused in words; the other ways to be many are still tried
        any_case.judge(problem)
        ran += 1
    if not ran:
        pytest.skip(f"{any_case.backend.name} refuses {many} pairs however they are arranged")


def test_rows_do_not_depend_on_their_company(any_case: Case):
    """A row of o is the same alone, in a batch, and among fewer rows, within a few roundings."""
    problem = any_case.problem(batch=3, seq_q=70, seq_kv=90, head_dim=64, heads_q=2, causal=True, pass_="fwd")
    inputs = make_inputs(problem, device=any_case.device)
    whole = any_case.run(problem, inputs)["o"]
    q, k, v = inputs.q, inputs.k, inputs.v
    alone = any_case.attention(q[1:2], k[1:2], v[1:2], problem)
    last = any_case.attention(q[:, :, -9:], k, v, problem)
    near = {"rtol": 0, "atol": 8 * any_case.roundoff * float(v.abs().max())}
    assert torch.allclose(alone, whole[1:2], **near)
    assert torch.allclose(last, whole[:, :, -9:], **near)


def test_repeats_are_bitwise_equal(case: Case):
    """A backend that declares itself deterministic gives the same bits every time, forward and backward."""
    if not case.backend.capability_on(case.device).deterministic:
        pytest.skip(f"{case.backend.name} does not declare itself deterministic on {case.device.type}")
    problem = case.problem(batch=2, heads_q=4, heads_kv=2, seq_q=200, seq_kv=257, head_dim=64, causal=True)
    inputs, _ = judged(problem.replace(precision=None, pass_="fwd+bwd"), str(case.device))
    first = case.run(problem, inputs)
    other = {name: torch.zeros((), dtype=torch.bool, device=case.device) for name in first}
    for _ in range(
        1_000 if case.device.type == "cuda" else 5
    ):  # compared on the device: a wait each time would cost more
        for name, x in case.run(problem, inputs).items():
            other[name] |= (x != first[name]).any()
    assert not [name for name, differs in other.items() if differs]
