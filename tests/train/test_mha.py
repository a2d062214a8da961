"""MultiHeadAttention: against torch's module, its options against the reference, and generation with a cache."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flash2
from flash2.core.mha import KVCache, MultiHeadAttention, rotate, rotations

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("naive", "sdpa", "numba")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(**options) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(32, 4, **({"backend": "naive"} | options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_torchs_module_gives_the_same(backend, bias, causal):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    for weight in theirs.parameters():  # its biases begin at 0, which would hide one in the wrong place
        nn.init.normal_(weight, std=0.2)
    ours = MultiHeadAttention.from_torch(theirs, causal=causal, backend=backend)
    x = noise(2, 9, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    want, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-6)
    back = ours.to_torch().state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in theirs.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 16}], ids=lambda options: next(iter(options))
)
def test_what_has_no_counterpart_is_refused(options):
    with pytest.raises(ValueError, match="no counterpart"):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(32, 4, **options))


@pytest.mark.parametrize(
    "options", [{"kv_heads": 2}, {"head_dim": 16}, {"rotary": 1e4}, {"softcap": 9.0}, {"qk_norm": True}]
)
def test_what_torchs_module_has_not_is_refused(options):
    with pytest.raises(ValueError, match="has no grouped heads"):
        module(**options).to_torch()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_against_the_equations(backend):
    """Grouped heads of their own width, QK-norm, rotary, a window: written out here once more, without the module."""
    options = {"kv_heads": 2, "head_dim": 6, "causal": True, "window": (3, 0), "rotary": 100.0, "qk_norm": True}
    layer = module(backend=backend, **options)
    nn.init.normal_(layer.q_norm.weight)
    x = noise(2, 7, 32)
    q, k, v = (layer.qkv(x) @ torch.eye(48)).split([24, 12, 12], -1)
    q, k, v = (part.reshape(2, 7, -1, 6).transpose(1, 2) for part in (q, k, v))

    def turned(part, weight):
        part = part / part.square().mean(-1, keepdim=True).add(1e-6).sqrt() * weight
        pairs = torch.complex(part[..., :3], part[..., 3:])
        angle = torch.arange(7.0)[:, None] * 100.0 ** -(torch.arange(3.0) / 3)
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k = turned(q, layer.q_norm.weight), turned(k, layer.k_norm.weight)
    s = q @ k.repeat_interleave(2, 1).mT / 6**0.5
    far = torch.arange(7)[:, None] - torch.arange(7)
    p = s.masked_fill((far < 0) | (far > 3), -torch.inf).softmax(-1)
    want = layer.out((p @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)


def test_rotary_depends_on_distances_alone():
    q, k = noise(1, 1, 1, 8), noise(1, 1, 1, 8, seed=1)

    def product(at_q, at_k):
        turn = [rotations(50.0, at, 1, 8, torch.device("cpu")) for at in (at_q, at_k)]
        return (rotate(q, *turn[0]) * rotate(k, *turn[1])).sum()

    torch.testing.assert_close(product(3, 1), product(40, 38), rtol=1e-4, atol=1e-5)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": (4, 0)}, {"kv_heads": 1}], ids=["plain", "window", "grouped"])
def test_a_cache_gives_what_the_whole_sequence_gives(backend, options):
    layer = module(backend=backend, causal=True, rotary=1e4, qk_norm=True, **options).eval()
    x = noise(2, 13, 32)
    with torch.no_grad():
        want, cache = layer(x), layer.new_cache(2, 13)
        pieces = [layer(piece, cache) for piece in x.split([5, 1, 1, 3, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-5, atol=1e-6)
    assert cache.length == 13


def test_a_full_cache_says_so():
    cache = KVCache(1, 2, 4, 8, dtype=torch.float32, device=torch.device("cpu"))
    cache.append(noise(1, 2, 3, 8), noise(1, 2, 3, 8))
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        cache.append(noise(1, 2, 2, 8), noise(1, 2, 2, 8))


def test_autocast_and_dropout():
    layer = module(causal=True, rotary=1e4, qk_norm=True, dropout=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.eval()(noise(1, 5, 32)).dtype == torch.bfloat16
    dropped = (layer.train()(noise(1, 50, 32)) == 0).float().mean()
    assert 0.4 < dropped < 0.6


def test_a_backend_by_name_by_object_or_the_devices_own():
    x = noise(1, 6, 32)
    outputs = [module(backend=backend)(x) for backend in ("numba", flash2.get_backend("numba"), None)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("sizes", "options", "says"),
    [
        ((32, 5), {}, "d_model 32 is not a multiple of heads 5"),
        ((32, 4), {"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ((12, 4), {"rotary": 1e4}, "head_dim 3 is odd"),
        ((32, 4), {"backend": "tritn"}, "unknown backend 'tritn'; known: "),
        ((32, 4), {"window": 5}, "window must be"),
    ],
)
def test_bad_input_is_refused_in_words(sizes, options, says):
    with pytest.raises(ValueError, match=says):
        MultiHeadAttention(*sizes, **options)


def test_an_unavailable_backend_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has what sdpa-cudnn needs")
    with pytest.raises(RuntimeError, match="'sdpa-cudnn' is unavailable: needs a CUDA device"):
        module(backend="sdpa-cudnn")(noise(1, 4, 32))
