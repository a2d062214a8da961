"""The backend inside torch: torch.compile, autocast, checkpointing, CUDA graphs of compiled models."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import flash2
from flash2.backends.triton_fa2 import launch

pytestmark = [
    # torch's compiler warns about itself: it instantiates autograd functions, and asks old names of its own.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # On a GPU its compiler recommends TF32 for the projections; fp32 is held to 1e-4 here.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # CUDA graphs of compiled models begin with an empty one, whose warning torch 2.11 records, which does not stop an error.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    # max-autotune asks for the size of a storage by its old name.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of another test is found again."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """Attention as a model has it: packed projections, grouped heads, views for inputs."""

    def __init__(self, device, *, width=16, heads=2, heads_kv=1, **options):
        super().__init__()
        self.sizes, self.options = (heads, heads_kv, heads_kv), options
        self.head_dim = width // heads
        generator = torch.Generator().manual_seed(0)
        self.qkv = nn.Linear(width, sum(self.sizes) * self.head_dim)
        self.out = nn.Linear(width, width)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
        self.to(device)

    def forward(self, x):
        packed = self.qkv(x).unflatten(-1, (sum(self.sizes), self.head_dim)).transpose(1, 2)
        o = flash2.attention(*packed.split(self.sizes, 1), backend="triton", **self.options)
        return x + self.out(o.transpose(1, 2).flatten(2))


def step(model, block, x) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the parameters of `block`."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *block.parameters()))]


def assert_same(got, want, **tolerance):
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, n=number: f"tensor {n}: {text}")


def stretch(device, length=9, dtype=torch.float32):
    """Input of a Block."""
    return torch.randn(1, length, 16, generator=torch.Generator().manual_seed(length)).to(device, dtype)


class Recorder:
    """A compiler of graphs that runs them as they are, and remembers their operators."""

    def __init__(self):
        self.graphs: list[list[str]] = []
        self.backend = aot_autograd(fw_compiler=self.compile, bw_compiler=self.compile)

    def compile(self, graph, _):
        self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)


# ---- torch.compile


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (5, 0), "softcap": 3.0}], ids=str)
def test_compiled_whole(device, options):
    """fullgraph, forward and backward; the graphs hold our operators and nothing else that attends."""
    block, recorder = Block(device, **options), Recorder()
    compiled = torch.compile(block, fullgraph=True, backend=recorder.backend)
    assert_same(step(compiled, block, stretch(device)), step(block, block, stretch(device)))
    forward, backward = recorder.graphs
    assert forward.count("flash2.attention.default") == backward.count("flash2.attention_backward.default") == 1
    assert not [name for name in (*forward, *backward) if "softmax" in name or "bmm" in name or "dot_product" in name]


def test_compiled_for_every_length(device):
    """The second length makes the length a variable, the third compiles nothing."""
    block = Block(device, causal=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (9, 12):
        assert_same(step(compiled, block, stretch(device, length)), step(block, block, stretch(device, length)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(compiled, block, stretch(device, 17)), step(block, block, stretch(device, 17)))


def test_compiled_without_gradients(device):
    block, recorder = Block(device, causal=True), Recorder()
    compiled = torch.compile(block, fullgraph=True, backend=recorder.backend)
    with torch.no_grad():
        assert_same([compiled(stretch(device))], [block(stretch(device))])
    assert len(recorder.graphs) == 1


def test_compiled_under_autocast(device):
    """Cast once, on entry, compiled or not; float32 parameters get float32 gradients."""
    block = Block(device, causal=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got, want = (step(model, block, stretch(device)) for model in (compiled, block))
    assert_same(got, want, rtol=2**-7, atol=2**-7)
    assert all(x.dtype == torch.float32 for x in got[1:])


def test_compiled_it_runs_as_pinned(device, monkeypatch):
    """With the pins that the backend has when the graph runs; the next ones compile nothing."""
    block, seen, attend, differentiate = Block(device, causal=True), [], launch.attend, launch.differentiate
    monkeypatch.setattr(launch, "attend", lambda *arguments: seen.append(arguments[-1]) or attend(*arguments))
    monkeypatch.setattr(
        launch, "differentiate", lambda *arguments: seen.append(arguments[-1]) or differentiate(*arguments)
    )
    backend = flash2.get_backend("triton")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    step(compiled, block, stretch(device))
    try:
        pins = backend.pin(fwd="16x32 w4 s1", dq="32x16 w4 s1").pins
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(compiled, block, stretch(device))
    finally:
        backend.pin()
    assert seen == [{}, {}, pins, pins]
    assert pins


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")  # that it met an exception
def test_compiling_what_is_refused_says_why(device):
    x = torch.zeros(1, 1, 4, 300, device=device)
    attend = torch.compile(lambda x: flash2.attention(x, x, x, backend="triton"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"head_dim 300 \(has 1 to 256\)"):
        attend(x)


# ---- checkpointing


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointed(device, reentrant, compiled, monkeypatch):
    """The gradients of a recomputed attention are those of a kept one; it does run twice."""
    block, runs = Block(device, causal=True), []
    kept = step(block, block, stretch(device))
    attend = launch.attend
    monkeypatch.setattr(launch, "attend", lambda *arguments: runs.append(1) or attend(*arguments))

    def recomputed(x):
        return checkpoint(block, x, use_reentrant=reentrant)

    if compiled and reentrant:
        pytest.skip("torch.compile takes use_reentrant=False alone")
    model = torch.compile(recomputed, fullgraph=True, backend="aot_eager") if compiled else recomputed
    if reentrant:  # which fills .grad and cannot be asked for gradients of its own
        x = stretch(device).requires_grad_()
        y = model(x)
        y.float().square().sum().backward()
        got = [y.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]
    else:
        got = step(model, block, stretch(device))
    assert_same(got, kept)
    assert len(runs) == 2


# ---- what takes a GPU


def on_cuda(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: --device cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_inductor(device, mode, dtype):
    """The default compiler on views of a packed projection; reduce-overhead replays a CUDA graph of it."""
    on_cuda(device)
    block = Block(device, width=128, heads=4, heads_kv=2, causal=True).to(DTYPES[dtype])
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for length in (64, 65, 64):
        x = torch.randn(2, length, 128, device=device, dtype=DTYPES[dtype])
        got = [part.clone() for part in step(compiled, block, x)]
        bound = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}[dtype]
        assert_same(got, step(block, block, x), rtol=bound, atol=bound)


def test_compiled_on_a_side_stream(device):
    """A compiled forward and backward wait for what a busy side stream writes."""
    on_cuda(device)
    block = Block(device, causal=True)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.zeros_like(stretch(device))
    step(compiled, block, x)
    want = step(block, block, stretch(device))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(stretch(device))
        got = step(compiled, block, x)
    stream.synchronize()
    assert_same(got, want, rtol=1e-4, atol=1e-4)


# torch 2.11's capture still holds the autograd graph of its warm-up, on another stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_a_captured_training_step(device):
    """make_graphed_callables captures forward and backward of the eager model; replays see new inputs."""
    on_cuda(device)
    block = Block(device, causal=True)
    want = {n: step(block, block, stretch(device) * n) for n in (1, 2)}
    graphed = torch.cuda.make_graphed_callables(Block(device, causal=True), (stretch(device).requires_grad_(),))
    for n in (1, 2):
        assert_same(step(graphed, graphed, stretch(device) * n), want[n], rtol=1e-4, atol=1e-4)
