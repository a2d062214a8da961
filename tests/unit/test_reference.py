"""The oracle against values worked out by hand and against autograd; the emulation against its classes."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from flash2.core import reference
from flash2.core.reference import attention_gradients, attention_reference, emulate, ieee_matmul, oracle

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def _randn(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _tensors(seq_q=5, seq_kv=7, heads_q=4, heads_kv=2, dim=8, batch=2):
    q, do = _randn(batch, heads_q, seq_q, dim), _randn(batch, heads_q, seq_q, dim, seed=1)
    return q, _randn(batch, heads_kv, seq_kv, dim, seed=2), _randn(batch, heads_kv, seq_kv, dim, seed=3), do


def _matrix(*rows):
    return torch.tensor([[rows]], dtype=F64)


def test_two_by_two_by_hand():
    # Row 0 has logits (0, ln 3): weights 1/4, 3/4. Row 1 has logits (ln 2, 0): weights 2/3, 1/3.
    q, k = _matrix([math.log(3)], [-math.log(2)]), _matrix([0.0], [1.0])
    v = _matrix([4.0], [8.0])
    o, lse = attention_reference(q, k, v, scale=1.0)
    torch.testing.assert_close(o, _matrix([0.25 * 4 + 0.75 * 8], [2 / 3 * 4 + 1 / 3 * 8]))
    torch.testing.assert_close(lse, torch.tensor([[[math.log(4), math.log(1.5)]]], dtype=F64))
    # Causal: row 0 sees key 0 alone.
    o, lse = attention_reference(q, k, v, scale=1.0, causal=True)
    torch.testing.assert_close(o, _matrix([4.0], [2 / 3 * 4 + 1 / 3 * 8]))
    torch.testing.assert_close(lse[0, 0, 0], torch.tensor(0.0, dtype=F64))
    # With do = 1 in row 0: dv = weights, ds = w (v - o) = (1/4 (4 - 7), 3/4 (8 - 7)), dq = ds . k, dk = ds q.
    do = _matrix([1.0], [0.0])
    dq, dk, dv = attention_gradients(do, q, k, v, scale=1.0)
    torch.testing.assert_close(dq, _matrix([0.75], [0.0]))
    torch.testing.assert_close(dk, _matrix([-0.75 * math.log(3)], [0.75 * math.log(3)]))
    torch.testing.assert_close(dv, _matrix([0.25], [0.75]))


def test_default_scale_and_softcap_by_hand():
    q, k, v = _matrix([2.0, 0.0, 0.0, 0.0]), _matrix([3.0, 0, 0, 0], [0.0, 0, 0, 0]), _matrix([1.0, 0, 0, 0], [0.0] * 4)
    o, lse = attention_reference(q, k, v)  # logits 2*3/sqrt(4) = 3 and 0
    assert o[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-3)), rel=1e-14)
    o, lse = attention_reference(q, k, v, softcap=2.0)
    capped = 2 * math.tanh(1.5)
    assert o[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-capped)), rel=1e-14)
    assert lse.item() == pytest.approx(math.log(1 + math.exp(capped)), rel=1e-14)


def test_bottom_right_window_and_alibi_by_hand():
    # 2 queries, 4 keys: query 0 stands at key 2, query 1 at key 3. All logits are 0 but for the bias.
    q, k = torch.zeros(1, 1, 2, 1, dtype=F64), torch.zeros(1, 1, 4, 1, dtype=F64)
    v = _matrix([1.0], [10.0], [100.0], [1000.0])
    o, _ = attention_reference(q, k, v, causal=True)
    torch.testing.assert_close(o, _matrix([111 / 3], [1111 / 4]))
    o, _ = attention_reference(q, k, v, window=(1, 0))
    torch.testing.assert_close(o, _matrix([110 / 2], [1100 / 2]))
    o, _ = attention_reference(q, k, v, window=(0, 1))
    torch.testing.assert_close(o, _matrix([1100 / 2], [1000.0]))
    o, lse = attention_reference(q, k, v, alibi_slopes=torch.tensor([math.log(2)]))  # weights 2^-distance
    torch.testing.assert_close(lse.exp(), torch.tensor([[[2.25, 1.875]]], dtype=F64), atol=1e-7, rtol=1e-7)
    weighted = (0.25 * 1 + 0.5 * 10 + 100 + 0.5 * 1000) / 2.25
    assert o[0, 0, 0, 0].item() == pytest.approx(weighted, rel=1e-7)


def test_alibi_slopes_of_each_batch():
    q, k, v, do = _tensors()
    slopes = torch.rand(2, 4, generator=torch.Generator().manual_seed(5))
    both = oracle(q, k, v, do, alibi_slopes=slopes)
    for batch in range(2):
        one = [x[batch : batch + 1] for x in (q, k, v, do)]
        alone = oracle(*one, alibi_slopes=slopes[batch])
        for name in ("o", "lse", "dq", "dk", "dv"):
            torch.testing.assert_close(both[name][batch], alone[name][0])


def _by_autograd(q, k, v, do, keep, *, scale, softcap=0.0, slopes=None):
    # The definition with nothing of the module under test: one softmax per row, row by row, over the visible keys.
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    group, rows = q.shape[1] // k.shape[1], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if keep(i, j)]
                if not seen:
                    rows.append(torch.zeros(q.shape[3], dtype=F64))
                    continue
                s = (k[b, h // group, seen] * q[b, h, i]).sum(-1) * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                if slopes is not None:
                    place = i + k.shape[2] - q.shape[2]
                    s = s - slopes[h].double() * torch.tensor([abs(j - place) for j in seen], dtype=F64)
                rows.append(torch.softmax(s, 0) @ v[b, h // group, seen])
    o = torch.stack(rows).reshape(q.shape)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


@pytest.mark.parametrize(("seq_q", "seq_kv"), [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize(
    ("options", "band"),
    [
        ({}, (None, None)),
        ({"causal": True}, (None, 0)),
        ({"window": (2, 1)}, (2, 1)),
        ({"window": (None, 1)}, (None, 1)),
        ({"window": (1, None), "causal": True}, (1, 0)),
        ({"softcap": 0.7}, (None, None)),
        ({"scale": 0.9, "softcap": 2.0, "causal": True}, (None, 0)),
        ({"slopes": True, "causal": True}, (None, 0)),
        ({"slopes": True, "window": (3, 3)}, (3, 3)),
    ],
    ids=str,
)
def test_against_autograd_of_the_definition(options, band, seq_q, seq_kv):
    options = dict(options)
    q, k, v, do = _tensors(seq_q, seq_kv)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if options.pop("slopes", False) else None
    left, right = band

    def keep(i, j):
        away = j - (i + seq_kv - seq_q)
        return (left is None or away >= -left) and (right is None or away <= right)

    scale = options.get("scale", 8**-0.5)
    expected = _by_autograd(q, k, v, do, keep, scale=scale, softcap=options.get("softcap", 0.0), slopes=slopes)
    out = oracle(q, k, v, do, alibi_slopes=slopes, **options)
    for name, value in zip(("o", "dq", "dk", "dv"), expected, strict=True):
        torch.testing.assert_close(out[name], value, rtol=1e-12, atol=1e-12)
    o, lse = attention_reference(q, k, v, alibi_slopes=slopes, **options)
    assert torch.equal(o, out["o"]) and torch.equal(lse, out["lse"])
    for name, value in zip(
        ("dq", "dk", "dv"), attention_gradients(do, q, k, v, alibi_slopes=slopes, **options), strict=True
    ):
        assert torch.equal(value, out[name])


def test_rows_that_see_nothing():
    q, k, v, do = _tensors(seq_q=6, seq_kv=3)
    out = oracle(q, k, v, do, causal=True)
    assert (out["lse"][:, :, :3] == -torch.inf).all() and out["lse"][:, :, 3:].isfinite().all()
    for name in ("o", "dq"):
        assert (out[name][:, :, :3] == 0).all() and (out[name][:, :, 3:] != 0).any()
    assert all(x.isfinite().all() for name, x in out.items() if name != "lse")


@pytest.mark.parametrize(("seq_q", "seq_kv", "batch"), [(0, 3, 2), (3, 0, 2), (0, 0, 2), (3, 3, 0)])
def test_empty_tensors(seq_q, seq_kv, batch):
    q, k, v, do = _tensors(seq_q, seq_kv, batch=batch)
    out = oracle(q, k, v, do)
    for name, like in (("o", q), ("dq", q), ("dk", k), ("dv", v)):
        assert out[name].shape == like.shape and (out[name] == 0).all()
    assert out["lse"].shape == q.shape[:3] and (out["lse"] == -torch.inf).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_values_reach_nothing_and_visible_ones_their_rows(value):
    q, k, v, do = _tensors(seq_q=6, seq_kv=6)
    clean = oracle(q, k, v, do, causal=True)
    k[0, 0, 4], v[0, 0, 4], q[1, 3, 2] = value, value, value  # key 4 is hidden from queries 0 to 3
    out = oracle(q, k, v, do, causal=True)
    for head in range(2):  # the group of the first key/value head
        assert torch.equal(out["o"][0, head, :4], clean["o"][0, head, :4])
        assert torch.equal(out["dq"][0, head, :4], clean["dq"][0, head, :4])
        assert not out["o"][0, head, 4:].isfinite().any()
    for name in ("o", "dq"):
        assert torch.equal(out[name][0, 2:], clean[name][0, 2:])
    assert out["o"][1, 3, 2].isnan().all() and torch.equal(out["o"][1, 3, 3:], clean["o"][1, 3, 3:])
    for name in ("dk", "dv"):  # query 2 sees keys 0 to 2
        assert out[name][1, 1, :3].isnan().all() and torch.equal(out[name][1, 1, 3:], clean[name][1, 1, 3:])


@pytest.mark.parametrize("scratch", [1, 3000, 20000])
def test_blocks_change_nothing(monkeypatch, scratch):
    q, k, v, do = _tensors(seq_q=9, seq_kv=7)
    options = {"causal": True, "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}
    whole = oracle(q, k, v, do, **options)
    monkeypatch.setitem(reference.SCRATCH_BYTES, "cpu", scratch)
    assert sum(len(rows) for _, rows in reference._blocks(4, 2, 9, 7, scratch)) > 1
    for name, x in oracle(q, k, v, do, **options).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-12)


def test_sizes_are_what_random_signs_would_give():
    q, k, v, do = _tensors(seq_q=40, seq_kv=60, dim=32)
    out = oracle(q, k, v, do)
    for name in ("o", "dq", "dk", "dv"):
        rows = out[name].square().mean(-1).sqrt()
        assert (out[f"size_{name}"] >= rows * (1 - 1e-12)).all()
        assert out[f"size_{name}"].median() < 3 * rows.median()  # and no loose bound
    # One key: dq and dk cancel to nothing, their sizes do not.
    out = oracle(q, k[:, :, :1], v[:, :, :1], do)
    assert (out["dq"].abs() < 1e-12).all() and (out["size_dq"] > 0.1).all() and (out["size_dk"] > 0.1).all()


def _relative(precision, dtype, name):
    q, k, v, do = (x.to(dtype) for x in _tensors(seq_q=128, seq_kv=128, dim=64))
    ref, got = oracle(q, k, v, do), emulate(q, k, v, do, precision=precision)
    assert got[name].dtype == (torch.float32 if precision == "fp64" else dtype)
    return float((got[name].double() - ref[name]).square().mean().sqrt() / ref[f"size_{name}"].square().mean().sqrt())


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_classes_have_the_error_of_their_roundings(name):
    error = {p: _relative(p, torch.float32, name) for p in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")}
    assert 5e-8 < error["ieee"] < 1e-6
    assert 0.5 < error["bf16x6"] / error["ieee"] < 2
    assert 0.5 < error["tf32x3"] / error["ieee"] < 3
    assert 4 < error["bf16x3"] / error["ieee"] < 40
    assert 50 < error["tf32"] / error["bf16x3"] < 1000
    assert 1e-4 < _relative("fp16", torch.float16, name) < 4e-4
    assert 1e-3 < _relative("bf16", torch.bfloat16, name) < 4e-3
    assert 5e-8 < _relative("fp64", torch.float64, name) < 1e-6


def test_tf32_is_cut_to_ten_bits():
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, -(1 + 2.0**-10 + 2.0**-12), 3.0])
    assert reference.cut_tf32(x).tolist() == [1 + 2.0**-10, 1.0, -(1 + 2.0**-10), 3.0]
    assert reference.cut_bf16(torch.tensor([1 + 2.0**-7, 1 + 2.0**-9])).tolist() == [1 + 2.0**-7, 1.0]


def test_split_products_add_up():
    a, b = _randn(8, 300).float(), _randn(300, 8, seed=1).float()
    exact = a.double() @ b.double()
    for precision, bits in (("tf32x3", 20), ("bf16x3", 15), ("bf16x6", 21)):
        error = (reference._PRODUCTS[precision](a, b).double() - exact).abs().max()
        assert error < 2.0**-bits * (a.abs() @ b.abs()).max() / 8


def test_ieee_matmul_restores_the_callers_setting(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for wanted in ("tf32", "ieee"):
            matmul.fp32_precision = wanted
            with contextlib.suppress(KeyError), ieee_matmul():
                assert matmul.fp32_precision == "ieee"
                raise KeyError  # restored after an error too
            assert matmul.fp32_precision == wanted
    finally:
        matmul.fp32_precision = before


def test_emulation_ignores_lowered_matmuls():
    # A CPU with bf16 units honours this; where there are none the setting alone is what can be seen.
    q, k, v, _ = (x.float() for x in _tensors(seq_q=128, seq_kv=128, dim=64))
    plain = emulate(q, k, v, precision="ieee")["o"]
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert torch.equal(emulate(q, k, v, precision="ieee")["o"], plain)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
