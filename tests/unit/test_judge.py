"""The judge's own conduct: what it accepts, what it refuses and how it says so. Planted bugs: harness/test_mutants.py."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flash2.core import judge as judge_module
from flash2.core.inputs import Inputs, make_inputs
from flash2.core.judge import BUDGETS, ROUNDING, Judge
from flash2.core.problem import PRECISIONS, Problem
from flash2.core.reference import emulate

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEM = Problem(batch=3, heads_q=4, heads_kv=2, seq_q=40, seq_kv=48, head_dim=32, causal=True, pass_="fwd+bwd")
OUTPUTS = ("o", "lse", "dq", "dk", "dv")


def _outputs(problem, inputs, precision=None):
    """Honest outputs: the emulation's, in the dtypes a backend returns."""
    return emulate(
        inputs.q, inputs.k, inputs.v, inputs.do, precision=precision or problem.precision, causal=problem.causal,
        window=problem.window, softcap=problem.softcap, scale=problem.scale, alibi_slopes=inputs.alibi_slopes,
    )  # fmt: skip


def _check(outputs, problem=PROBLEM, inputs=None, **options):
    inputs = inputs or make_inputs(problem)
    return Judge(problem, inputs, **options).check(outputs, problem.precision)


@pytest.fixture
def honest():
    return _outputs(PROBLEM, make_inputs(PROBLEM))


def test_every_class_has_constants():
    classes = {precision for names in PRECISIONS.values() for precision in names}
    assert set(BUDGETS) == set(ROUNDING) == classes


def test_honest_outputs_pass_and_say_by_how_much(honest):
    verdict = _check(honest)
    assert verdict.ok and "of its budget" in verdict.reason
    assert set(verdict.per_tensor) == set(OUTPUTS)
    worst = max((verdict.per_tensor[name] for name in OUTPUTS if name != "lse"), key=lambda report: max(report.used))
    assert verdict.error == {"max": worst.max, "rms": worst.rms, "worst_row": worst.worst_row}
    assert 0 < worst.rms < worst.max < 1e-4
    json.dumps(verdict.error, allow_nan=False)
    for name in OUTPUTS:  # any of them alone
        assert _check({name: honest[name]}).ok


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_wrong_element_is_found_and_named(honest, name):
    place = (2, 1, 17, 5)[: honest[name].dim()]
    honest[name][place] += 0.5
    verdict = _check(honest)
    assert not verdict.ok
    assert verdict.reason.startswith(f"{name} breaks T1 at {place}: off by 0.5 "), verdict.reason
    assert verdict.per_tensor[name].where == place
    assert [other for other in OUTPUTS if verdict.per_tensor[other].wrong] == [name]


def test_one_wrong_row_breaks_t3_alone():
    # A row of o an hundredth as large as the others, and half of it wrong: neither the largest error nor the rms shows.
    problem = Problem(heads_q=2, seq_q=64, seq_kv=4096, head_dim=64, dtype="bf16")
    inputs = make_inputs(problem)
    inputs.q[:, 0, :60] = 30 * inputs.k[:, 0, :60]
    inputs.q[:, 1] = 30 * inputs.k[:, 1, :64]
    o = _outputs(problem, inputs)["o"]
    o[0, 0, 62] *= 1.06
    verdict = _check({"o": o}, problem, inputs)
    report = verdict.per_tensor["o"]
    assert report.used[0] < 1 and report.used[1] < 1 < report.used[2]
    assert verdict.reason.startswith("o breaks T3 at row (0, 0, 62)"), verdict.reason


def test_a_noisy_tensor_breaks_t2():
    # Rows long enough to have much the same error each, so that the rms tells before a single row does.
    problem = PROBLEM.replace(dtype="bf16", precision=None, head_dim=256, causal=False)
    inputs = make_inputs(problem)
    o = _outputs(problem, inputs)["o"]
    noise = torch.rand(o.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    verdict = _check({"o": (o.float() * (1 + 0.009 * noise)).bfloat16()}, problem, inputs)
    assert not verdict.ok and "breaks T2" in verdict.reason, verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OUTPUTS)
def test_nan_and_inf_are_wrong_wherever_they_are(honest, name, value):
    shape = honest[name].shape
    for batch in range(3):
        outputs = {key: x.clone() for key, x in honest.items()}
        outputs[name][(batch, shape[1] - 1, 3)] = value
        # A budget for the least of work: batch 1 is outside the sample.
        verdict = _check(outputs, flops=1)
        assert not verdict.ok, f"batch {batch}"
        assert f"{name} is {value} at ({batch}, {shape[1] - 1}, 3" in verdict.reason
        assert all(x is None or math.isfinite(x) for x in verdict.error.values())


def test_rows_that_see_nothing_must_be_exact():
    problem = PROBLEM.replace(seq_q=60, seq_kv=20)
    inputs = make_inputs(problem)
    for name, value in (("o", 1e-30), ("lse", -1e30), ("dq", -1e-30)):
        for batch in (0, 1):  # in the sample and outside it
            outputs = _outputs(problem, inputs)
            assert _check(outputs, problem, inputs, flops=1).ok
            outputs[name][batch, 1, 39] = value  # 40 empty rows
            verdict = _check(outputs, problem, inputs, flops=1)
            assert not verdict.ok and "a row that sees no key" in verdict.reason, verdict.reason
    outputs = _outputs(problem, inputs)
    outputs["lse"][0, 0, 40] = -math.inf
    assert not _check(outputs, problem, inputs).ok


def test_keys_that_nobody_sees_have_exactly_zero_gradient():
    problem = PROBLEM.replace(seq_q=8, seq_kv=40, causal=False, window=(3, 3))  # keys 0 to 28
    inputs = make_inputs(problem)
    outputs = _outputs(problem, inputs)
    assert _check(outputs, problem, inputs).ok
    outputs["dk"][1, 1, 4, 0] = 1e-30
    assert not _check(outputs, problem, inputs).ok


def test_a_visible_nan_must_be_in_the_output():
    inputs = make_inputs(PROBLEM)
    inputs.q[0, 0, 3] = math.nan
    outputs = _outputs(PROBLEM, inputs)
    assert _check(outputs, inputs=inputs).ok
    outputs["o"][0, 0, 3] = 0
    verdict = _check(outputs, inputs=inputs)
    assert not verdict.ok and "a NaN is visible" in verdict.reason


def test_form_is_judged_before_numbers(honest):
    inputs = make_inputs(PROBLEM)

    class Lazy(torch.Tensor):
        pass

    def reason(name, x):
        verdict = Judge(PROBLEM, inputs).check({**honest, name: x}, "ieee")
        assert not verdict.ok and verdict.reason.startswith(f"{name} ") and verdict.error["max"] is None
        json.dumps(verdict.error, allow_nan=False)
        return verdict.reason

    assert "not a plain torch.Tensor" in reason("o", honest["o"].as_subclass(Lazy))
    assert "is a NoneType" in reason("lse", None)
    assert "has shape" in reason("dk", honest["dk"].repeat_interleave(2, 1))
    assert "is torch.bfloat16, not torch.float32" in reason("o", honest["o"].bfloat16())
    assert "is torch.float64, not torch.float32" in reason("lse", honest["lse"].double())
    assert "is on meta" in reason("dv", honest["dv"].to("meta"))
    assert "memory of the input q" in reason("o", inputs.q)
    assert "memory of the input do" in reason("dq", inputs.do.view(-1).view(inputs.do.shape))


def test_questions_that_make_no_sense_raise(honest):
    judge = Judge(PROBLEM, make_inputs(PROBLEM))
    with pytest.raises(ValueError, match="precision 'bf16' is no class of fp32; it has: ieee, "):
        judge.check(honest, "bf16")
    with pytest.raises(ValueError, match="unknown output 'dlse'"):
        judge.check({"dlse": honest["lse"]}, "ieee")
    assert not judge.check({}, "ieee").ok


CHEAPER = {"ieee": ("tf32", "bf16x3"), "bf16x6": ("tf32", "bf16x3"), "tf32x3": ("tf32", "bf16x3"), "bf16x3": ("tf32",)}


@pytest.mark.parametrize(("claimed", "real"), [(claimed, real) for claimed in CHEAPER for real in CHEAPER[claimed]])
@pytest.mark.parametrize("distribution", ["randn", "half"])
def test_a_cheaper_class_does_not_pass_for_a_dearer_one(distribution, claimed, real):
    problem = Problem(heads_q=2, seq_q=200, head_dim=64, causal=True, pass_="fwd+bwd")
    inputs = make_inputs(problem, distribution=distribution)
    judge = Judge(problem, inputs)
    outputs = _outputs(problem, inputs, real)
    assert judge.check(outputs, real).ok
    for part in (("o",), ("dq", "dk", "dv")):  # a forward alone and a backward alone
        verdict = judge.check({name: outputs[name] for name in part}, claimed)
        assert not verdict.ok, verdict.reason


@pytest.mark.parametrize("precision", ["ieee", "bf16x6"])
@pytest.mark.parametrize("claimed", ["ieee", "tf32x3", "bf16x6", "bf16x3", "tf32"])
def test_the_exact_fp32_classes_pass_for_every_other(claimed, precision):
    problem = Problem(heads_q=2, seq_q=200, head_dim=64, causal=True, pass_="fwd+bwd")
    inputs = make_inputs(problem)
    verdict = Judge(problem, inputs).check(_outputs(problem, inputs, precision), claimed)
    assert verdict.ok, verdict.reason


def test_fp64_is_held_to_fp64():
    problem = PROBLEM.replace(dtype="fp64", precision=None)
    inputs = make_inputs(problem)
    single = _outputs(problem, inputs)  # float32 arithmetic: 2^29 times too coarse
    outputs = {name: x.double() for name, x in single.items()}
    assert not _check(outputs, problem, inputs).ok
    exact = judge_module.oracle(inputs.q, inputs.k, inputs.v, inputs.do, causal=True)
    assert _check({name: exact[name] for name in OUTPUTS}, problem, inputs).ok


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [{"seq_kv": 1}, {"seq_q": 1}, {"seq_q": 1, "seq_kv": 1, "head_dim": 1}])
def test_noise_where_the_reference_is_zero_is_no_alarm(shape, dtype):
    problem = PROBLEM.replace(**{"causal": False, "seq_q": 33, **shape}, dtype=dtype, precision=None)
    for seed in range(10):
        inputs = make_inputs(problem, seed=seed)
        outputs = _outputs(problem, inputs)
        delta = (inputs.do.float() * outputs["o"].float()).flip(-1).cumsum(-1)[..., -1:]  # another order of summing
        if problem.seq_kv == 1:
            dp = inputs.do.float() @ inputs.v.float().repeat_interleave(2, 1).mT
            ds = (dp - delta) * 32**-0.5
            dq = ds * inputs.k.float().repeat_interleave(2, 1)
            outputs["dq"] = dq.to(outputs["dq"].dtype)
        verdict = _check(outputs, problem, inputs)
        assert verdict.ok, verdict.reason
        outputs["dq"] = outputs["dq"] + 0.1  # still a mistake
        assert not _check(outputs, problem, inputs).ok


@pytest.mark.parametrize("sizes", [{"seq_q": 0}, {"seq_kv": 0}, {"batch": 0}])
def test_empty_problems(sizes):
    problem = PROBLEM.replace(**sizes, causal=False)
    inputs = make_inputs(problem)
    outputs = _outputs(problem, inputs)
    assert _check(outputs, problem, inputs).ok
    if problem.seq_kv == 0:
        outputs["o"][0, 0, 0] = 1
        assert not _check(outputs, problem, inputs).ok


def test_large_problems_are_sampled_by_whole_groups():
    problem = Problem(batch=4, heads_q=8, heads_kv=4, seq_q=16, head_dim=8, pass_="fwd+bwd")
    inputs = make_inputs(problem)
    one_group = 2 * 16 * 16 * (4 * 8 + judge_module._FLOPS_PER_EXP)
    judge = Judge(problem, inputs, flops=5 * one_group, seed=1)
    batch, head = judge._groups(backward=False)
    chosen = list(zip(batch.tolist(), head.tolist(), strict=True))
    assert len(chosen) == 5 and chosen == sorted(set(chosen))
    assert chosen[0] == (0, 0) and chosen[-1] == (3, 3)
    others = [
        list(
            zip(*(x.tolist() for x in Judge(problem, inputs, flops=5 * one_group, seed=s)._groups(False)), strict=True)
        )
        for s in (1, 2)
    ]
    assert others[0] == chosen != others[1]
    assert len(judge._groups(backward=True)[0]) < 5  # a backward costs more
    outputs = _outputs(problem, inputs)
    for n, (b, h) in enumerate(chosen):
        for query_head in (2 * h, 2 * h + 1):
            wrong = {"o": outputs["o"].clone()}
            wrong["o"][b, query_head, 9, 3] += 1
            verdict = judge.check(wrong, "ieee")
            assert not verdict.ok and verdict.per_tensor["o"].where == (b, query_head, 9, 3), n


def test_the_oracle_runs_once(monkeypatch, honest):
    calls = []
    for name in ("oracle", "emulate"):
        real = getattr(judge_module, name)
        monkeypatch.setattr(
            judge_module, name, lambda *a, name=name, real=real, **k: calls.append((name, len(a))) or real(*a, **k)
        )
    judge = Judge(PROBLEM, make_inputs(PROBLEM))
    forward = {name: honest[name] for name in ("o", "lse")}
    for _ in range(3):
        assert judge.check(forward, "ieee").ok
    assert calls == [("oracle", 3), ("emulate", 3)]
    for precision in ("ieee", "tf32", "ieee", "tf32"):
        assert judge.check(honest, precision).ok
        assert judge.check(forward, precision).ok
    assert calls[2:] == [("oracle", 4), ("emulate", 4), ("emulate", 4)]


def test_slopes_of_each_batch_are_taken_along():
    problem = PROBLEM.replace(alibi=True)
    plain = make_inputs(problem)
    slopes = torch.stack([plain.alibi_slopes * factor for factor in (1.0, 3.0, 0.2)])
    inputs = Inputs(plain.q, plain.k, plain.v, plain.do, slopes)
    outputs = _outputs(problem, inputs)
    assert _check(outputs, problem, inputs).ok and _check(outputs, problem, inputs, flops=1).ok
    assert not _check(outputs, problem, plain).ok
