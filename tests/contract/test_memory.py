"""Tensors lie in memory in any way, inputs are never written, outputs are the caller's own."""

from __future__ import annotations

import pytest
import torch
from judged import Case, judged

from flash2.core.inputs import LAYOUTS, UPSTREAMS


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts(case: Case, layout):
    """Views of packed and longer buffers, offsets, last stride 2 and stride 0 are read right or refused in words."""
    case.judge(
        case.problem(batch=2, heads_q=4, heads_kv=2, seq_q=33, seq_kv=37, head_dim=16, causal=True), layout=layout
    )


@pytest.mark.parametrize("upstream", sorted(UPSTREAMS))
def test_upstream_gradients(case: Case, upstream):
    """dO comes in the strides autograd really uses, also 0 everywhere."""
    problem = case.problem(batch=2, heads_q=2, seq_q=33, seq_kv=33, head_dim=16)
    if problem.pass_ == "fwd":
        pytest.skip(f"{case.backend.name} has no backward on {case.device.type}")
    case.judge(problem, upstream=upstream)


@pytest.mark.parametrize("layout", ["bhsd", "strided", "expanded-heads"])
def test_inputs_are_never_written(case: Case, layout):
    """q, k, v, dO and the slopes hold the same bits after a call, and nobody wrote to them in between."""
    fields = {"alibi": True} if case.has("alibi") else {}
    problem = case.problem(heads_q=2, seq_q=20, seq_kv=24, head_dim=16, causal=True, **fields)
    inputs, _ = judged(problem.replace(precision=None, pass_="fwd+bwd"), str(case.device), layout=layout, seed=3)
    tensors = [x for x in (inputs.q, inputs.k, inputs.v, inputs.do, inputs.alibi_slopes) if x is not None]
    before = [(x.clone(), x._version) for x in tensors]
    case.run(problem, inputs)
    for x, (bits, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, bits)
        assert x._version == version


def test_outputs_are_not_reused(any_case: Case):
    """What one call returned does not change when the next one runs."""
    problem = any_case.problem(heads_q=2, seq_q=40, seq_kv=40, head_dim=16)
    first = any_case.judge(problem, seed=0)
    kept = {name: x.clone() for name, x in first.items()}
    any_case.judge(problem, seed=1)
    for name, x in first.items():
        assert torch.equal(x, kept[name]), name
