"""A backend as an operator of torch: schema, fake tensors, autograd, names."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import flash2
from flash2.backends import get_backend
from flash2.core import functional, operators
from flash2.core.contract import FEATURES, Backend, Capability, check_inputs
from flash2.core.inputs import make_inputs
from flash2.core.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler


class Padded(Backend):
    """naive, whose outputs have rows of 16 elements more than they show, as kernels like them."""

    name = "padded"
    capability = Capability(devices=("cpu",), precisions={"fp32": ("ieee",)}, features=frozenset(FEATURES))
    opaque = True

    def forward(self, q, k, v, spec):
        o, lse = get_backend("naive").forward(q, k, v, spec)
        return padded(o), lse

    def backward(self, *arguments):
        return tuple(padded(grad) for grad in get_backend("naive").backward(*arguments))


def padded(x):
    return x.new_empty((*x.shape[:3], x.shape[3] + 16))[..., : x.shape[3]].copy_(x)


@pytest.fixture(autouse=True)
def shelved(monkeypatch):
    own, find = Padded(), flash2.core.find_backend
    monkeypatch.setattr(flash2.core, "find_backend", lambda name, kind: own if name == "padded" else find(name, kind))
    torch.compiler.reset()
    yield own
    torch.compiler.reset()


PROBLEMS = {
    "packed": ({"causal": True}, "packed"),
    "expanded": ({"heads_kv": 1, "heads_q": 2}, "expanded-heads"),
    "strided": ({"window": (3, None)}, "strided"),
    "everything": ({"causal": True, "softcap": 3.0, "alibi": True, "window": (9, 2), "scale": -0.5}, "bshd"),
}


def arguments(name):
    """(arguments of attention, arguments of attention_backward)."""
    fields, layout = PROBLEMS[name]
    problem = Problem(**{"batch": 2, "heads_q": 2, "seq_q": 3, "seq_kv": 5, "head_dim": 4, **fields})
    inputs = make_inputs(problem, layout=layout, upstream="sum")
    q, k, v = inputs.q, inputs.k, inputs.v
    _, spec = check_inputs(
        q, k, v, causal=problem.causal, scale=problem.scale, window=problem.window, softcap=problem.softcap,
        alibi_slopes=inputs.alibi_slopes,
    )  # fmt: skip
    left, right = spec.window or (None, None)
    options = ("padded", spec.alibi_slopes, spec.scale, spec.precision, spec.causal, left, right, spec.softcap)
    assert operators.to_spec(*options[1:]).band == spec.band
    o, lse = get_backend("naive").forward(q, k, v, spec)
    return (q, k, v, *options), (inputs.do, q, k, v, o, lse, *options)


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck(name):
    """Schema, fake tensors with the strides of the real ones, autograd, and what AOTAutograd makes of it."""
    forward, backward = arguments(name)
    leaves = tuple(x.detach().requires_grad_() if n < 3 else x for n, x in enumerate(forward))
    torch.library.opcheck(torch.ops.flash2.attention.default, leaves)
    torch.library.opcheck(torch.ops.flash2.attention_backward.default, backward)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_operator_is_the_backend(name):
    """Bit for bit, forward and through the operator's own autograd; lse has no gradient."""
    (q, k, v, *options), (do, *saved) = arguments(name)
    spec = operators.to_spec(*options[1:])
    want = get_backend("naive").backward(do, *saved[:5], spec)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = torch.ops.flash2.attention(*leaves, *options)
    assert not lse.requires_grad
    got = (o.detach(), lse, *torch.autograd.grad(o, leaves, do))
    for x, y in zip(got, (*saved[3:5], *want), strict=True):
        assert torch.equal(x, y)


def test_it_saves_the_least():
    """Nothing under no_grad; q, k, v, o and lse, each once, for a backward."""
    (q, k, v, *options), _ = arguments("packed")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            torch.ops.flash2.attention(q.requires_grad_(), k, v, *options)
        assert not saved
        torch.ops.flash2.attention(q, k, v, *options)
    assert [x.shape for x in saved] == [q.shape, k.shape, v.shape, q.shape, q.shape[:3]]


def test_it_has_no_second_derivative():
    (q, k, v, *options), (do, *_) = arguments("packed")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, _ = torch.ops.flash2.attention(*leaves, *options)
    gradients = torch.autograd.grad(o, leaves, do, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradients[0].sum(), leaves)


def test_a_compiled_graph_holds_it_whole(shelved):
    """One operator forward, one backward, nothing else that attends; the third length compiles nothing."""
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def attend(q, k, v):
        return functional.attention(q * 2, k, v, causal=True, backend=shelved)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for seq in (5, 7, 9):
        leaves = [torch.randn(1, heads, seq, 8).requires_grad_() for heads in (4, 2, 2)]
        with torch._dynamo.config.patch(error_on_recompile=seq == 9):
            o = compiled(*leaves)
        want = attend(*leaves)
        assert torch.equal(o, want)
        for x, y in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (o, want)), strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)
    forward, backward = graphs[:2]
    assert forward.count("flash2.attention.default") == backward.count("flash2.attention_backward.default") == 1
    assert not [name for name in (*forward, *backward) if "softmax" in name or "bmm" in name]


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")  # that it met an exception
def test_another_object_under_its_name_is_refused():
    """An operator would find the one on the shelf, and compute with that."""
    x, other = torch.zeros(1, 1, 4, 8), Padded()
    attend = torch.compile(lambda x: functional.attention(x, x, x, backend=other), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="register_backend"):
        attend(x)
