"""Inputs: the same numbers for a seed in every layout, memory laid out as named, each distribution as described."""

from __future__ import annotations

import math

import pytest
import torch

from flash2.core.inputs import DISTRIBUTIONS, LAYOUTS, UPSTREAMS, alibi_slopes, make_inputs
from flash2.core.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEM = Problem(batch=2, heads_q=4, heads_kv=2, seq_q=12, seq_kv=20, head_dim=16, dtype="fp32")
NAMES = ("q", "k", "v", "do")


def _same(x, y):
    return torch.equal(x.nan_to_num(nan=1e30), y.nan_to_num(nan=1e30))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_seeded_finite_and_of_the_problems_shape(distribution, dtype):
    problem = PROBLEM.replace(dtype=dtype, precision=None, alibi=True)
    one, again, other = (make_inputs(problem, distribution=distribution, seed=seed) for seed in (3, 3, 4))
    for name in NAMES:
        x = getattr(one, name)
        heads, seq = (2, 20) if name in "kv" else (4, 12)
        assert x.shape == (2, heads, seq, 16) and x.isfinite().all() and not x.requires_grad
        assert torch.equal(x, getattr(again, name))
    assert not torch.equal(one.v, other.v) and not torch.equal(one.do, other.do)
    assert one.alibi_slopes.shape == (4,) and make_inputs(PROBLEM).alibi_slopes is None


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("expanded")])
def test_layouts_hold_the_same_numbers(layout):
    plain, laid = make_inputs(PROBLEM, seed=1), make_inputs(PROBLEM, seed=1, layout=layout)
    for name in NAMES:
        assert _same(getattr(plain, name), getattr(laid, name)), name


def test_layouts_lie_in_memory_as_named():
    def laid(layout):
        inputs = make_inputs(PROBLEM, layout=layout)
        return {name: getattr(inputs, name) for name in NAMES}

    assert all(x.is_contiguous() for x in laid("bhsd").values())
    assert all(x.transpose(1, 2).is_contiguous() and not x.is_contiguous() for x in laid("bshd").values())
    packed = laid("packed")
    assert len({packed[name].untyped_storage().data_ptr() for name in "qkv"}) == 1
    assert packed["q"].stride() == packed["v"].stride() == (20 * 8 * 16, 16, 8 * 16, 1)
    assert packed["q"].untyped_storage().data_ptr() != packed["do"].untyped_storage().data_ptr()
    assert all(x.stride(-1) == 2 for x in laid("strided").values())
    for x in laid("offset").values():
        assert x.storage_offset() == 1 and x.data_ptr() % 16 == 4
    for name in ("sliced", "strided"):
        for x in laid(name).values():  # whatever lies between and beyond is poison
            storage = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())
            assert int(storage.isnan().sum()) == storage.numel() - x.numel() > 0
    heads, batch = laid("expanded-heads"), laid("expanded-batch")
    assert all(heads[name].stride(1) == 0 and batch[name].stride(0) == 0 for name in "kv")
    assert heads["q"].is_contiguous() and torch.equal(heads["k"][:, 0], heads["k"][:, 1])
    assert torch.equal(batch["v"][0], batch["v"][1])


def test_upstream_gradients_come_in_autograds_strides():
    do = {name: make_inputs(PROBLEM, layout="bshd", upstream=name).do for name in UPSTREAMS}
    assert do["sum"].stride() == (0, 0, 0, 0) and (do["sum"] == 1).all()
    assert do["dense"].is_contiguous() and do["transpose"].transpose(1, 2).is_contiguous()
    assert do["like"].stride() == do["transpose"].stride() and do["cat"].stride(2) == 32
    assert all(torch.equal(do[name], do["dense"]) for name in ("like", "cat", "transpose"))
    x = torch.zeros(2, 4, 12, 16, requires_grad=True)  # what torch itself hands down
    seen = []
    x.register_hook(lambda grad: seen.append(grad.stride()))
    (x * 1).sum().backward()
    o = x * 1
    o.register_hook(lambda grad: seen.append(grad.stride()))
    o.sum().backward()
    assert seen[-2] == do["sum"].stride()


def _logits(inputs, problem):
    keys = inputs.k.double().repeat_interleave(problem.heads_q // problem.heads_kv, 1)
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    return inputs.q.double() @ keys.mT * scale


@pytest.mark.parametrize("scale", [None, 0.5, -0.5])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_distributions_are_what_they_say(dtype, scale):
    problem = PROBLEM.replace(dtype=dtype, precision=None, seq_q=64, seq_kv=128, head_dim=64, scale=scale)
    s = _logits(make_inputs(problem, distribution="shifted"), problem)
    assert s.mean().item() == pytest.approx(-200, abs=10)
    assert s.logsumexp(-1).max() < -88  # where float32's exp(0 - lse) overflows
    s = _logits(make_inputs(problem, distribution="extreme"), problem)
    assert s.abs().min() >= 3e5 and (s.amax(-1) == s.amin(-1)).all()
    assert (s[..., 0::2, :] * s[..., 1::2, :] < 0).all()  # both signs
    top = torch.softmax(_logits(make_inputs(problem, distribution="needle"), problem), -1).amax(-1)
    assert top.median() > 0.7
    ramp = make_inputs(problem, distribution="needle").v.float().mean((0, 1, 3))
    assert (ramp[8:] - ramp[:-8]).min() > 0
    wide, narrow = (make_inputs(problem, distribution=name) for name in ("x10", "half"))
    assert torch.allclose(wide.q.float(), 20 * narrow.q.float(), rtol=0.02)


@pytest.mark.parametrize("band", [{"causal": True}, {"window": (5, 2)}, {"window": (None, 0), "causal": True}])
def test_needles_are_visible(band):
    problem = PROBLEM.replace(seq_q=64, seq_kv=100, head_dim=64, **band)
    best = _logits(make_inputs(problem, distribution="needle"), problem).argmax(-1)
    place = torch.arange(64) + 36
    left, right = problem.band
    seen = (left is None or best >= place - left) & (best <= place + right)
    assert seen.float().mean() > 0.9


@pytest.mark.parametrize("sizes", [{"seq_q": 0}, {"seq_kv": 0}, {"batch": 0}, {"seq_q": 1, "seq_kv": 1, "head_dim": 1}])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_degenerate_sizes(distribution, sizes):
    problem = PROBLEM.replace(**sizes)
    for layout in LAYOUTS:
        inputs = make_inputs(problem, distribution=distribution, layout=layout)
        assert inputs.q.shape[2] == problem.seq_q and inputs.v.shape[2] == problem.seq_kv


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(16)[:2].tolist() == pytest.approx([2**-0.5, 0.5])
    # 12 heads: those of 8, then every second one of 16.
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-n for n in range(1, 9)] + [2.0**-x for x in (0.5, 1.5, 2.5, 3.5)]
    )
    assert alibi_slopes(1).tolist() == [2.0**-8] and alibi_slopes(3).dtype == torch.float32


@pytest.mark.parametrize("argument", ["distribution", "layout", "upstream"])
def test_unknown_names_list_the_known(argument):
    with pytest.raises(ValueError, match=f"unknown {argument} 'uniform'; known: .*, "):
        make_inputs(PROBLEM, **{argument: "uniform"})


def test_scale_zero_is_no_error():
    inputs = make_inputs(PROBLEM.replace(scale=0.0), distribution="needle")
    assert all(math.isfinite(float(getattr(inputs, name).sum())) for name in NAMES)
    make_inputs(PROBLEM.replace(scale=0.0), distribution="shifted")
