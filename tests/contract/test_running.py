"""How a call behaves in a program: autograd, autocast, streams, graphs, devices, refusals."""

from __future__ import annotations

import pytest
import torch
from judged import Case, judged

from flash2.core.contract import FEATURES
from flash2.core.inputs import make_inputs

few = pytest.mark.few_shapes
SMALL = {"heads_q": 2, "seq_q": 20, "seq_kv": 24, "head_dim": 16, "causal": True}


def needs_backward(case: Case) -> None:
    """Skip, in words, where there is none."""
    if not case.backend.capability_on(case.device).backward:
        pytest.skip(f"{case.backend.name} has no backward on {case.device.type}")


def leaves(case: Case, **fields):
    """(problem, inputs, [q, k, v] that require gradients)."""
    problem = case.problem(**SMALL, **fields)
    inputs = make_inputs(problem, device=case.device)
    return problem, inputs, [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]


def test_no_grad_saves_nothing(any_case: Case):
    """Under no_grad nothing is kept for a backward; with gradients something is, so this can fail."""
    needs_backward(any_case)
    problem, _, (q, k, v) = leaves(any_case)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            o = any_case.attention(q, k, v, problem)
        assert not saved
        assert not o.requires_grad
        any_case.attention(q, k, v, problem)
    assert saved


def test_gradients_only_where_asked(any_case: Case):
    """q alone, or v alone, may require a gradient; it is the one that all together give."""
    needs_backward(any_case)
    problem, inputs, (q, k, v) = leaves(any_case)
    together = torch.autograd.grad(any_case.attention(q, k, v, problem), (q, k, v), inputs.do)
    for number, x in enumerate((q, k, v)):
        arguments = [y if y is x else y.detach() for y in (q, k, v)]
        (alone,) = torch.autograd.grad(any_case.attention(*arguments, problem), x, inputs.do)
        assert torch.allclose(alone, together[number], rtol=8 * any_case.roundoff, atol=8 * any_case.roundoff)


def test_a_backward_runs_twice_if_kept(any_case: Case):
    """retain_graph keeps what the backward reads intact."""
    needs_backward(any_case)
    problem, inputs, (q, k, v) = leaves(any_case)
    o = any_case.attention(q, k, v, problem)
    first = torch.autograd.grad(o, (q, k, v), inputs.do, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(o, (q, k, v), inputs.do), strict=True):
        assert torch.allclose(once, again, rtol=8 * any_case.roundoff, atol=8 * any_case.roundoff)


def test_double_backward_is_refused(any_case: Case):
    """Our own kernels have no second derivative, and say so instead of returning zeros."""
    needs_backward(any_case)
    if any_case.backend.autograd:
        pytest.skip(f"{any_case.backend.name} is differentiated by torch, which answers for second derivatives")
    problem, inputs, (q, k, v) = leaves(any_case)
    o = any_case.attention(q, k, v, problem)
    gradients = torch.autograd.grad(o, (q, k, v), inputs.do, create_graph=True)
    for gradient in gradients:
        for x in (q, k, v):
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(gradient.sum(), x, retain_graph=True)


def test_lse_is_not_differentiable(any_case: Case):
    """No gradient flows through lse, and torch knows that none does."""
    needs_backward(any_case)
    if not any_case.has("lse"):
        pytest.skip(f"{any_case.backend.name} has no lse")
    problem, _, (q, k, v) = leaves(any_case)
    o, lse = any_case.attention(q, k, v, problem, return_lse=True)
    assert o.requires_grad
    assert not lse.requires_grad


def test_autocast_computes_in_the_low_dtype(any_case: Case):
    """float32 tensors under autocast give what casting them first gives, and float32 gradients."""
    needs_backward(any_case)
    low = any_case.backend.classes("bf16", any_case.device) or any_case.backend.classes("fp16", any_case.device)
    if not low:
        pytest.skip(f"{any_case.backend.name} takes neither bf16 nor fp16")
    dtype = torch.bfloat16 if low[0] == "bf16" else torch.float16
    case = Case(any_case.backend, low[0], any_case.device)
    problem = case.problem(**SMALL)
    inputs = make_inputs(problem, device=case.device)
    q, k, v = (x.float().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with torch.autocast(case.device.type, dtype=dtype):
        o = case.attention(q, k, v, problem)
    assert o.dtype == dtype
    assert torch.equal(o, case.attention(q.to(dtype), k.to(dtype), v.to(dtype), problem))
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
def test_compiled_it_is_one_operator(any_case: Case):
    """What torch.compile cannot trace stands in its graph whole, forward and backward, and computes what it does in
    an eager call; a second length makes the length a variable."""
    if not any_case.backend.opaque:
        pytest.skip(f"{any_case.backend.name} is traced by torch")
    torch.compiler.reset()

    def attend(q, k, v):
        return any_case.attention(q, k, v, problem) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seq in (20, 33, 47):
        problem = any_case.problem(heads_q=4, heads_kv=2, seq_q=seq, seq_kv=seq, head_dim=24, causal=True, softcap=3.0)
        inputs = make_inputs(problem, layout="bshd", device=any_case.device)
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        for got, want in zip(*(_with_gradients(f, leaves, inputs.do) for f in (compiled, attend)), strict=True):
            assert torch.allclose(got, want, rtol=8 * any_case.roundoff, atol=8 * any_case.roundoff)
    torch.compiler.reset()


def _with_gradients(function, leaves, do):
    o = function(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def test_what_is_not_declared_is_refused_in_words(any_case: Case):
    """Asking for an undeclared feature raises, names it, and computes nothing."""
    problem = any_case.problem(heads_q=2, seq_q=8, seq_kv=8, head_dim=16, pass_="fwd")
    inputs = make_inputs(problem, device=any_case.device)
    asking = {
        "causal": {"causal": True},
        "gqa": {"heads_kv": 1},
        "cross": {"seq_kv": 9},
        "window": {"window": (2, 2)},
        "softcap": {"softcap": 5.0},
        "alibi": {"alibi": True},
        "scale": {"scale": 0.3},
        "empty-rows": {"seq_q": 9, "causal": True},
    }
    assert set(asking) == set(FEATURES) - {"lse", "hidden-nan"}
    for feature, fields in asking.items():
        reasons = any_case.backend.why_not(problem.replace(**fields), any_case.device)
        assert any_case.has(feature) != (f"no {feature}" in reasons), (feature, reasons)
    if not any_case.has("lse"):
        with pytest.raises(NotImplementedError, match="no lse"):
            any_case.attention(inputs.q, inputs.k, inputs.v, problem, return_lse=True)
    if not any_case.has("softcap"):
        with pytest.raises(NotImplementedError, match="no softcap"):
            any_case.attention(inputs.q, inputs.k, inputs.v, problem.replace(softcap=5.0))


def test_another_class_of_maths_is_refused(any_case: Case):
    """No silent TF32: a class the backend does not compute in raises."""
    taken = any_case.backend.classes("fp32", any_case.device)
    absent = [c for c in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6") if c not in taken]
    if not absent:
        pytest.skip(f"{any_case.backend.name} computes in every class of fp32")
    q = torch.zeros(1, 1, 4, 16, device=any_case.device)
    for precision in absent:
        case = Case(any_case.backend, precision, any_case.device)
        with pytest.raises(NotImplementedError, match="fp32"):
            case.attention(q, q, q, any_case.problem(seq_q=4, head_dim=16, pass_="fwd"))


def test_result_waits_on_the_current_stream(any_case: Case):
    """Work is queued on torch's current stream: inputs that a busy side stream fills are read after it filled them."""
    if any_case.device.type != "cuda":
        pytest.skip("streams belong to CUDA")
    problem = any_case.problem(heads_q=2, seq_q=129, seq_kv=129, head_dim=64)
    real, judge = judged(problem.replace(precision=None, pass_="fwd+bwd"), str(any_case.device))
    stale = make_inputs(problem, device=any_case.device, seed=9)
    any_case.run(problem, stale)  # compiled and tuned before the race
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, y in zip((stale.q, stale.k, stale.v, stale.do), (real.q, real.k, real.v, real.do), strict=True):
            x.copy_(y)
        outputs = any_case.run(problem, stale)
    stream.synchronize()
    verdict = judge.check(outputs, any_case.precision)
    assert verdict.ok, verdict.reason


def test_cuda_graph_replays_on_new_inputs(any_case: Case):
    """Captured once, replayed on inputs that changed after the capture, into outputs that were wiped."""
    if any_case.device.type != "cuda":
        pytest.skip("graphs belong to CUDA")
    problem = any_case.problem(heads_q=2, seq_q=129, seq_kv=129, head_dim=64, causal=True)
    real, judge = judged(problem.replace(precision=None, pass_="fwd+bwd"), str(any_case.device))
    static = make_inputs(problem, device=any_case.device, seed=9)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            any_case.run(problem, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = any_case.run(problem, static)
    for x in outputs.values():
        x.zero_()
    for x, y in zip((static.q, static.k, static.v, static.do), (real.q, real.k, real.v, real.do), strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    verdict = judge.check(outputs, any_case.precision)
    assert verdict.ok, verdict.reason


def test_the_tensors_device_counts_not_the_current_one(any_case: Case):
    """Tensors on cuda:1 are computed there while the current device is 0."""
    if any_case.device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = Case(any_case.backend, any_case.precision, torch.device("cuda", 1))
    with torch.cuda.device(0):
        out = other.judge(other.problem(**SMALL))
        assert torch.cuda.current_device() == 0
    assert out["o"].device == other.device
