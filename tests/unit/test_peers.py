"""The flash-attention adapters, given packages that only write down how they are called and compute it plainly."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

from flash2 import attention, get_backend
from flash2.backends.peers import flash_attention as peers
from flash2.core.contract import spec_of
from flash2.core.problem import Problem

H200 = torch.device("cuda")
DISTRIBUTION = {"fa2": "flash-attn", "fa3": "flash-attn-3", "fa4": "flash-attn-4"}


def plain(q, k, v, softmax_scale, window_size, softcap, open_end):
    """(o, lse) as the packages lay them out, bottom-right aligned."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k).float() * softmax_scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    far = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None]
    left, right = (None if end == open_end else end for end in window_size)
    if left is not None:
        s = s.masked_fill(far < -left, -torch.inf)
    if right is not None:
        s = s.masked_fill(far > right, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1).to(v.dtype), v).contiguous(), s.logsumexp(-1)


@pytest.fixture
def calls(monkeypatch):
    """The calls that the packages got: (module, arguments by name)."""
    made = []

    def fa2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        made.append(("fa2", dict(locals())))
        o, lse = plain(q, k, v, softmax_scale, window_size, softcap, -1)
        return (o, lse, None) if return_attn_probs else o

    def fa3(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0,
            return_attn_probs=False):  # fmt: skip
        made.append(("fa3", dict(locals())))
        o, lse = plain(q, k, v, softmax_scale, window_size, softcap, -1)
        return (o, lse) if return_attn_probs else o

    def fa4(
        q, k, v, qv=None, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, return_lse=False
    ):
        made.append(("fa4", dict(locals())))
        o, lse = plain(q, k, v, softmax_scale, window_size, softcap, None)
        return o, lse if return_lse else None

    for name, function in (("flash_attn", fa2), ("flash_attn_interface", fa3), ("flash_attn.cute", fa4)):
        module = types.ModuleType(name)
        module.flash_attn_func = function
        monkeypatch.setitem(sys.modules, name, module)
    for cached in (peers._fa2, peers._fa3, peers._fa4):
        cached.cache_clear()
    yield made
    for cached in (peers._fa2, peers._fa3, peers._fa4):
        cached.cache_clear()


def tensors(problem: Problem):
    torch.manual_seed(0)
    q = torch.randn(problem.batch, problem.heads_q, problem.seq_q, problem.head_dim, requires_grad=True)
    k, v = (
        torch.randn(problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim, requires_grad=True)
        for _ in range(2)
    )
    return q, k, v


@pytest.mark.parametrize("name", DISTRIBUTION)
@pytest.mark.parametrize(
    "fields",
    [
        {"seq_q": 9},
        {"seq_q": 9, "seq_kv": 14, "causal": True},
        {"seq_q": 9, "window": (3, 1), "softcap": 2.0},
        {"seq_q": 9, "causal": True, "window": (4, None), "scale": 0.3, "heads_kv": 2},
    ],
    ids=str,
)
def test_the_package_is_asked_for_the_problem(calls, name, fields):
    """What comes back, gradients and lse too, is what naive computes of the same tensors."""
    problem = Problem(batch=2, heads_q=4, head_dim=8, **fields)
    q, k, v = tensors(problem)
    o, lse = get_backend(name).forward(q, k, v, spec_of(problem))
    options = {key: getattr(problem, key) for key in ("causal", "window", "softcap", "scale")}
    want, want_lse = attention(q, k, v, backend="naive", return_lse=True, **options)
    assert torch.allclose(o, want, atol=1e-5)
    assert torch.allclose(lse, want_lse, atol=1e-5)
    assert not lse.requires_grad
    do = torch.randn_like(want)
    for got, expected in zip(
        torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True
    ):
        assert torch.allclose(got, expected, atol=1e-5)
    [(package, asked)] = calls
    assert package == name
    assert tuple(asked["q"].shape) == (2, 9, 4, 8)
    assert asked["causal"] == problem.causal


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_no_layout_is_converted(calls, name):
    """Dense tensors go in as views of the same memory, and o comes out as one."""
    problem = Problem(batch=2, heads_q=4, seq_q=9, head_dim=8)
    q, k, v = tensors(problem)
    o, _ = get_backend(name).forward(q, k, v, spec_of(problem))
    for mine, theirs in zip((q, k, v), (calls[0][1][x] for x in "qkv"), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    assert o.stride() == (9 * 4 * 8, 8, 4 * 8, 1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[..., ::2],
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: torch.empty(x.numel() + 1)[1:].view(x.shape),
        lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    ],
    ids=["rows with gaps", "stride 0", "unaligned address", "unaligned rows"],
)
def test_what_the_kernels_read_wrong_is_copied(spoil):
    x = spoil(torch.randn(2, 4, 6, 8))
    assert peers.readable(x) is not x
    assert peers.readable(x).is_contiguous()
    y = torch.randn(2, 6, 4, 8).transpose(1, 2)
    assert peers.readable(y) is y


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_a_gradient_of_stride_0_arrives_dense(calls, name, monkeypatch):
    problem = Problem(batch=2, heads_q=4, seq_q=9, head_dim=8)
    q, k, v = tensors(problem)
    seen = []
    readable = peers.readable
    monkeypatch.setattr(peers, "readable", lambda x: seen.append(readable(x)) or seen[-1])
    o, _ = get_backend(name).forward(q, k, v, spec_of(problem))
    o.sum().backward()
    assert len(seen) == 4
    assert seen[-1].is_contiguous()


def test_an_older_fa3_that_always_returns_the_lse(calls, monkeypatch):
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0: plain(
        q, k, v, softmax_scale, window_size, softcap, -1
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    peers._fa3.cache_clear()
    problem = Problem(heads_q=4, seq_q=9, head_dim=8)
    _, lse = get_backend("fa3").forward(*tensors(problem), spec_of(problem))
    assert tuple(lse.shape) == (1, 4, 9)


@pytest.mark.parametrize(("name", "distribution"), DISTRIBUTION.items())
def test_unavailable_says_why(monkeypatch, name, distribution):
    backend = get_backend(name)

    def nothing(asked):
        raise importlib.metadata.PackageNotFoundError(asked)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert backend.unavailable().startswith(f"{distribution} is not installed; ")
    assert backend.version() == f"{distribution} (not installed)"
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "9.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable() == "needs a CUDA device"
    assert backend.version() == f"{distribution} 9.9"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.unavailable() is None


@pytest.mark.parametrize(
    ("name", "arch", "fields", "says"),
    [
        ("fa4", (9, 0), {}, []),
        ("fa4", (8, 0), {}, ["needs sm_90 or newer, this device is sm_80"]),
        ("fa4", (9, 0), {"head_dim": 192}, []),
        ("fa4", (10, 0), {"head_dim": 192}, ["head_dim 192 (on Blackwell it has up to 128, and 256)"]),
        ("fa4", (9, 0), {"head_dim": 60}, ["head_dim 60 (has 8 to 256 in steps of 8)"]),
        ("fa3", (10, 0), {}, ["needs sm_90 or older, this device is sm_100"]),
        ("fa2", (8, 0), {"alibi": True}, []),
        ("fa4", (9, 0), {"alibi": True}, ["no alibi"]),
        ("fa2", (8, 0), {"batch": 70_000}, ["batch or heads above 65535"]),
        ("fa2", (8, 0), {"seq_q": 20, "seq_kv": 10, "causal": True}, ["no empty-rows"]),
        ("fa4", (9, 0), {"scale": -1.0}, ["scale <= 0"]),
        ("fa4", (9, 0), {"dtype": "fp32"}, ["dtype fp32"]),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_refused_in_words(monkeypatch, name, arch, fields, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: arch)
    reasons = get_backend(name).why_not(Problem(**{"seq_q": 64, "head_dim": 64, "dtype": "bf16", **fields}), H200)
    assert len(reasons) == len(says)
    assert all(reason.startswith(what) for reason, what in zip(reasons, says, strict=True))
