"""What the kernels compute where their tiles meet: every feature on lengths of several tiles with a rest, judged.

The simulator's tiles are 8 by 8, and operands come 4 columns or rows at a time.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash2.core.inputs import make_inputs

# (problem, how its inputs look): every layout, upstream and distribution is somewhere among them.
PROBLEMS = {
    "full": ({"seq_q": 18, "seq_kv": 11, "batch": 2}, {"layout": "bshd", "upstream": "transpose"}),
    "full-even": ({"seq_q": 16, "seq_kv": 8, "head_dim": 8}, {"upstream": "sum"}),
    "causal": ({"seq_q": 19, "heads_q": 2, "causal": True}, {"layout": "packed", "upstream": "cat"}),
    "causal-more-keys": ({"seq_q": 9, "seq_kv": 21, "causal": True}, {"layout": "sliced"}),
    "causal-more-queries": ({"seq_q": 21, "seq_kv": 9, "causal": True}, {"layout": "offset"}),
    "window": ({"seq_q": 13, "seq_kv": 20, "window": (5, 2)}, {"layout": "strided"}),
    "window-left": ({"seq_q": 20, "seq_kv": 13, "window": (6, None)}, {"upstream": "dense"}),
    "window-far-right": ({"seq_q": 5, "seq_kv": 30, "window": (3, 0)}, {"distribution": "needle"}),
    "causal-window": ({"seq_q": 20, "seq_kv": 15, "causal": True, "window": (9, 3)}, {}),
    "groups": (
        {"seq_q": 9, "seq_kv": 10, "heads_q": 4, "heads_kv": 2, "batch": 2, "causal": True, "head_dim": 4},
        {"layout": "expanded-batch"},
    ),
    "one-key-head": ({"seq_q": 9, "seq_kv": 10, "heads_q": 3, "head_dim": 4}, {"layout": "expanded-heads"}),
    "softcap": ({"seq_q": 10, "seq_kv": 13, "softcap": 2.0}, {"distribution": "x3"}),
    "alibi-causal": ({"seq_q": 18, "seq_kv": 11, "heads_q": 2, "alibi": True, "causal": True}, {}),
    "everything": (
        {"seq_q": 12, "seq_kv": 18, "heads_q": 2, "causal": True, "window": (9, 0), "softcap": 5.0, "alibi": True,
         "scale": -0.4},
        {"upstream": "cat"},
    ),
    "scale-negative": ({"seq_q": 10, "seq_kv": 13, "scale": -0.3}, {"distribution": "half"}),
    "scale-zero": ({"seq_q": 10, "seq_kv": 13, "scale": 0.0, "causal": True}, {}),
    "scale-subnormal": ({"seq_q": 10, "seq_kv": 13, "scale": 1e-40}, {}),
    "logits-far-below-zero": ({"seq_q": 10, "seq_kv": 21}, {"distribution": "shifted"}),
    "logits-extreme": ({"seq_q": 10, "seq_kv": 13}, {"distribution": "extreme"}),
    "head-dim-1": ({"seq_q": 9, "seq_kv": 10, "head_dim": 1}, {"distribution": "x10"}),
    "head-dim-40": ({"seq_q": 9, "seq_kv": 10, "head_dim": 40}, {"layout": "packed"}),
    "head-dim-256": ({"seq_q": 2, "seq_kv": 9, "head_dim": 256}, {}),
    "one-by-one": ({"seq_q": 1, "seq_kv": 1}, {}),
    "one-query": ({"seq_q": 1, "seq_kv": 19, "causal": True}, {"distribution": "needle"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(case, name):
    fields, how = PROBLEMS[name]
    case.judge(case.problem(**{"heads_q": 1, "heads_kv": 1, "head_dim": 6, **fields}), **how)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hidden_values_reach_not_one_bit(case, bad):
    """Causal: keys and values from 11 on, inside a tile, hold `bad`, and so do queries that key 12 is hidden from."""
    problem = case.problem(seq_q=18, head_dim=5, causal=True)
    inputs = make_inputs(problem)
    clean = case.run(problem, inputs)
    later = make_inputs(problem)
    later.k[:, :, 11:], later.v[:, :, 11:] = bad, bad
    out = case.run(problem, later)
    for name in ("o", "lse", "dq"):
        assert torch.equal(out[name][:, :, :11], clean[name][:, :, :11]), name
        assert not torch.equal(out[name], clean[name]), name
    inputs.q[:, :, :12], inputs.do[:, :, :12] = bad, bad
    out = case.run(problem, inputs)
    for name in ("dk", "dv"):
        assert torch.equal(out[name][:, :, 12:], clean[name][:, :, 12:]), name
        assert not torch.equal(out[name], clean[name]), name


def test_the_same_bits_every_time(case):
    problem = case.problem(seq_q=12, seq_kv=10, heads_q=2, heads_kv=1, head_dim=5)
    inputs = make_inputs(problem)
    first, second = case.run(problem, inputs), case.run(problem, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
