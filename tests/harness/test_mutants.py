"""The judge on trial: every planted bug is rejected, no honest implementation is."""

from __future__ import annotations

import itertools

import pytest
import torch
from mutants import BACKWARD, FORWARD, Tiled

import flash2
from flash2.core.contract import spec_of
from flash2.core.functional import run
from flash2.core.inputs import DISTRIBUTIONS, make_inputs
from flash2.core.judge import Judge
from flash2.core.problem import Problem

MUTANTS = FORWARD + BACKWARD
pytestmark = pytest.mark.usefixtures("one_thread")
# Problems between tiles, with every feature, for the honest implementations.
HONEST = {
    "dense": {"seq_q": 100},
    "one query": {"seq_q": 1, "seq_kv": 65},
    "one key": {"seq_q": 65, "seq_kv": 1},
    "causal": {"seq_q": 97, "causal": True},
    "causal, more keys": {"seq_q": 33, "seq_kv": 130, "causal": True},
    "causal, empty rows": {"seq_q": 130, "seq_kv": 70, "causal": True},
    "gqa": {"heads_q": 6, "seq_q": 64},
    "window": {"seq_q": 150, "window": (9, 3)},
    "softcap": {"seq_q": 100, "softcap": 5.0},
    "alibi": {"seq_q": 100, "alibi": True, "causal": True},
    "scale": {"seq_q": 100, "scale": 0.3},
    "odd head_dim": {"seq_q": 70, "head_dim": 40},
    "tiny": {"seq_q": 2, "head_dim": 1},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.pass_}: {mutant.bug}")
def test_judge_rejects(mutant):
    for problem in mutant.cases():
        inputs = mutant.inputs(problem)
        judge = Judge(problem, inputs)
        honest = judge.check(mutant.outputs(problem, inputs, mutated=False), problem.precision)
        assert honest.ok, f"{problem.key()}: the correct kernel is rejected: {honest.reason}"
        verdict = judge.check(mutant.outputs(problem, inputs), problem.precision)
        assert not verdict.ok, f"{problem.key()}: {mutant.bug} passes: {verdict.reason}"
        assert any(name in verdict.reason for name in ("o ", "lse ", "dq ", "dk ", "dv ")), verdict.reason


def test_there_are_enough_mutants():
    assert len(FORWARD) >= 14 and len(BACKWARD) >= 15
    assert len({(mutant.pass_, mutant.bug) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("shape", HONEST.values(), ids=HONEST)
def test_judge_accepts_the_correct_tiled_kernel(shape, dtype):
    problem = Problem(**{"heads_q": 2, "heads_kv": 2, "head_dim": 64, **shape}, dtype=dtype, pass_="fwd+bwd")
    for distribution in DISTRIBUTIONS:
        inputs = make_inputs(problem, distribution=distribution)
        tiled = Tiled(problem, inputs)
        o, lse = tiled.forward()
        outputs = dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *tiled.backward(o, lse)), strict=True))
        verdict = Judge(problem, inputs).check(outputs, problem.precision)
        assert verdict.ok, f"{distribution}: {verdict.reason}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("name", ["naive", "sdpa-flash", "sdpa-math"])
def test_judge_accepts_honest_backends(name, dtype):
    backend = flash2.get_backend(name)
    for causal, (seq, dim) in itertools.product((False, True), ((1, 32), (5, 64), (64, 32), (200, 64))):
        problem = Problem(heads_q=2, seq_q=seq, head_dim=dim, dtype=dtype, causal=causal, pass_="fwd+bwd")
        if reasons := backend.why_not(problem, torch.device("cpu")):
            pytest.skip(reasons[0])
        for distribution, seed in itertools.product(DISTRIBUTIONS, range(2)):
            inputs = make_inputs(problem, distribution=distribution, seed=seed)
            q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
            o, lse = run(backend, q, k, v, spec_of(problem), needs_grad=True)
            grads = torch.autograd.grad(o, (q, k, v), inputs.do)
            outputs = {"o": o.detach(), "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
            outputs = {tensor: x for tensor, x in outputs.items() if x is not None}
            verdict = Judge(problem, inputs).check(outputs, problem.precision)
            assert verdict.ok, f"{problem.key()} {distribution} seed {seed}: {verdict.reason}"
