"""attention(): arguments that make no sense are refused with what is allowed; what is refused is never run."""

from __future__ import annotations

import pytest
import torch

import flash2
from flash2.core.contract import Backend, Capability, nearest_supported
from flash2.core.functional import attention, hidden_keys, run
from flash2.core.problem import Problem

q, k, v = (torch.zeros(2, heads, seq, 8) for heads, seq in ((4, 5), (2, 7), (2, 7)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, not list"),
        ({"k": torch.zeros(2, 7, 8)}, ValueError, "k must be (batch, heads, seq, head_dim), not of shape (2, 7, 8)"),
        ({"v": v.double()}, ValueError, "v is torch.float64 on cpu, q is torch.float32 on cpu; make them equal"),
        ({"k": k.to("meta")}, ValueError, "k is torch.float32 on meta"),
        ({"v": v[:, :, :3]}, ValueError, "k (2, 2, 7, 8) and v (2, 2, 3, 8) must have one shape"),
        ({"q": torch.zeros(3, 4, 5, 8)}, ValueError, "must agree in batch and head_dim"),
        ({"q": torch.zeros(2, 4, 5, 16)}, ValueError, "must agree in batch and head_dim"),
        ({"q": torch.zeros(2, 3, 5, 8)}, ValueError, "heads_q 3 is not a multiple of heads_kv 2"),
        ({"q": q.int(), "k": k.int(), "v": v.int()}, ValueError, "dtype torch.int32 is not supported; use one of"),
        ({"window": (1, 2, 3)}, ValueError, "window must be (left, right)"),
        ({"softcap": -2.0}, ValueError, "softcap must be finite and >= 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"precision": "fp8"}, ValueError, "'fp8' is no class of fp32"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes must be float32 of shape (heads_q,)"),
        ({"alibi_slopes": torch.zeros(4).double()}, ValueError, "alibi_slopes must be float32"),
        ({"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes is on meta, q on cpu"),
        ({"precision": "bf16x6"}, NotImplementedError, "precision bf16x6 for fp32 (has ieee)"),
        ({"backend": "nave"}, ValueError, "unknown backend 'nave'; known: naive, sdpa"),
    ],
    ids=str,
)
def test_refusals(change, error, says):
    with pytest.raises(error) as caught:
        flash2.attention(**{"q": q, "k": k, "v": v, "backend": "naive", **change})
    assert says in str(caught.value)


class Picky(Backend):
    """Takes almost nothing, and fails the test if it is run."""

    name = "picky"
    capability = Capability(devices=("cuda",), precisions={"fp16": ("fp16",)}, head_dims=(64, 128), backward=False)

    def forward(self, q, k, v, spec):
        raise AssertionError("an unsupported problem was run")


def test_every_reason_is_given_at_once():
    with pytest.raises(NotImplementedError) as caught:
        attention(
            q.requires_grad_(), k, v, causal=True, softcap=1.0, window=(2, 2), scale=0.5,
            alibi_slopes=torch.zeros(4), backend=Picky(), return_lse=True,
        )  # fmt: skip
    text = str(caught.value)
    for reason in (
        "backend 'picky' cannot run b2-h4/2-n5x7-d8-causal-w2:2-cap1-alibi-scale0.5-fp32-ieee-fwd+bwd",
        "device cpu (runs on cuda)", "dtype fp32 (has fp16)", "head_dim 8 (has 64, 128)", "no causal", "no gqa",
        "no cross", "no window", "no softcap", "no alibi", "no scale", "no backward", "no lse (return_lse=True)",
    ):  # fmt: skip
        assert reason in text
    q.requires_grad_(False)


def test_an_unavailable_backend_says_why():
    class Absent(Picky):
        def unavailable(self):
            return "needs a wand; pip install wand"

    with pytest.raises(RuntimeError, match="'picky' is unavailable: needs a wand; pip install wand"):
        attention(q, k, v, backend=Absent())


def test_nearest_supported_problem():
    class Modest(Picky):
        capability = Capability(devices=("cpu",), precisions={"fp16": ("fp16",)}, head_dims=(64, 128))

    asked = Problem(heads_q=4, heads_kv=2, seq_q=8, head_dim=100, dtype="bf16", causal=True, softcap=3.0)
    nearest = nearest_supported(Modest(), asked, torch.device("cpu"))
    assert nearest == Problem(heads_q=4, seq_q=8, head_dim=128, dtype="fp16")
    assert nearest_supported(Picky(), asked, torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["softcaps", "fast-lse"])
def test_a_capability_is_checked(name):
    with pytest.raises(ValueError, match="unknown feature"):
        Capability(devices=("cpu",), precisions={"fp32": ("ieee",)}, features=frozenset({name}))
    with pytest.raises(ValueError, match="is not drawn from"):
        Capability(devices=("cpu",), precisions={"fp32": (name,)})


@pytest.mark.parametrize(("band", "hidden"), [((None, 0), 0), ((3, 0), 1), ((0, 0), 4), ((9, None), 0), ((0, None), 4)])
def test_keys_no_query_sees_are_cut_off(band, hidden):
    class Spy(Backend):
        name = "spy"

        def forward(self, q, k, v, spec):
            self.saw = k.shape[2]
            return q, None

    from flash2.core.contract import Spec

    spec = Spec(scale=1.0, precision="ieee", window=band)
    assert hidden_keys(spec, 4, 8) == hidden
    spy = Spy()
    run(spy, torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), spec, needs_grad=False)
    assert spy.saw == 8 - hidden


def test_lse_is_returned_on_request():
    o = flash2.attention(q, k, v, backend="naive")
    with_lse = flash2.attention(q, k, v, backend="naive", return_lse=True)
    assert isinstance(o, torch.Tensor)
    assert torch.equal(with_lse[0], o)
    assert with_lse[1].shape == (2, 4, 5)


def test_the_default_backend_is_that_of_the_device(monkeypatch):
    monkeypatch.setitem(flash2.backends.DEFAULTS, "cpu", "naive")
    assert torch.equal(flash2.attention(q, k, v), flash2.attention(q, k, v, backend="naive"))
    with pytest.raises(ValueError, match="no default backend for device 'meta'"):
        flash2.attention(q.to("meta"), k.to("meta"), v.to("meta"))
