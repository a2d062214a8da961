"""How the Triton launcher takes tensors of any strides: aligned copies, descriptors or pointers; no GPU needed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

triton = pytest.importorskip("triton")

from flash2.backends.gluon_hopper import gradients  # noqa: E402
from flash2.backends.gluon_hopper import launch as gluon  # noqa: E402
from flash2.backends.triton_fa2 import configs, launch  # noqa: E402
from flash2.core.contract import spec_of  # noqa: E402
from flash2.core.problem import Problem  # noqa: E402

SHAPE = (2, 3, 10, 24)


def packed(dtype=torch.bfloat16):
    """q of a packed (batch, seq, 3, heads, head_dim) projection."""
    batch, heads, seq, head_dim = SHAPE
    return torch.randn(batch, seq, 3, heads, head_dim).to(dtype)[:, :, 0].transpose(1, 2)


def odd_start(dtype=torch.bfloat16):
    """A dense tensor that starts one element into its memory."""
    return torch.randn(1 + 2 * 3 * 10 * 24).to(dtype)[1:].view(SHAPE)


READ_AS_THEY_ARE = {
    "dense": lambda: torch.randn(SHAPE),
    "packed": packed,
    "BSHD": lambda: torch.randn(2, 10, 3, 24).transpose(1, 2),
    "broadcast": lambda: torch.randn(1, 1, 10, 24).expand(SHAPE),
    "one row of an odd stride": lambda: torch.randn(2, 3, 10, 27)[..., :1, :24].expand(2, 3, 1, 24)[:1, :1],
}
COPIED = {
    "an odd head_dim": lambda: torch.randn(2, 3, 10, 23),
    "a slice of an odd row": lambda: torch.randn(2, 3, 10, 27)[..., :24],
    "an odd start": odd_start,
    "a transposed head_dim": lambda: torch.randn(2, 3, 24, 10).mT,
    "one element a row": lambda: torch.randn(2, 3, 10, 1),
    "no row's elements are neighbours": lambda: torch.ones(()).expand(SHAPE),
}


@pytest.mark.parametrize("name", READ_AS_THEY_ARE)
def test_no_copy_where_16_bytes_can_be_read(name):
    x = READ_AS_THEY_ARE[name]()
    assert launch.aligned(x) is x


@pytest.mark.parametrize("name", COPIED)
def test_an_aligned_copy(name):
    x = COPIED[name]()
    copy = launch.aligned(x)
    assert copy is not x
    assert torch.equal(copy, x)
    assert launch.aligned(copy) is copy
    assert launch.fits_descriptor(copy)


@pytest.mark.parametrize("name", [*READ_AS_THEY_ARE, *COPIED])
def test_outputs_are_laid_out_like_their_inputs(name):
    x = (READ_AS_THEY_ARE | COPIED)[name]()
    out = launch.empty_like(x)
    assert out.shape == x.shape
    assert out.stride(3) == 1
    value = torch.randn(x.shape).to(x.dtype)
    assert torch.equal(out.copy_(value), value)  # no element shares its memory with another
    if x.is_contiguous() or name in ("packed", "BSHD"):
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("broadcast", [False, True])
def test_a_row_with_descriptors_has_a_partner_with_pointers(monkeypatch, broadcast, pinned):
    """A stride of 0 fits no descriptor; the table's tile, with pointers, would spill. A pin keeps its tile."""
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "nobody's")
    problem = Problem(batch=2, heads_q=4, seq_q=2048, head_dim=128, dtype="bf16", precision="bf16")
    q = torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta")
    k = q[:, :1].expand_as(q) if broadcast else q
    maths = launch.Maths(q, k, spec_of(problem))
    pin = configs.parse("128x128 w8 s2 tma")
    config = maths.config("fwd", {"fwd": pin} if pinned else {}, (q, k, k))
    row = configs.known(maths.key("fwd"))
    if broadcast:
        assert config == (pin.replace(tma=False) if pinned else configs.fallback(maths.key("fwd")))
        assert not config.tma
    else:
        assert config == (pin if pinned else row)
        assert config.tma


def triton_launch():
    """A launch through a descriptor."""
    tile = configs.TileConfig(block_m=64, block_n=64, tma=True)
    return launch.Launch(None, (1,), tile, ((1, 1, 64, 64), None), (), {})


def gluon_launch():
    """The same of the Gluon kernels."""
    return gluon.Launch(None, (1,), ((64, 64), None), (), {})


def gluon_gradients_launch():
    """And of their backward, which moves scratch in other shapes, too."""
    return gradients.Launch(None, (1,), ((64, 64), (32,)), (), {})


@pytest.mark.parametrize("made", [triton_launch, gluon_launch, gluon_gradients_launch], ids=lambda made: made.__name__)
def test_a_planned_launch_keeps_no_tensor(made):
    """It lives as long as the process; in a CUDA graph's pool a tensor that it held would be a leak."""
    planned, tensors = made(), (torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16), torch.zeros(128))
    arguments = planned.arguments(tensors)
    held = [weakref.ref(x) for x in tensors]
    assert all(ref() is not None for ref in held)
    del arguments, tensors
    gc.collect()
    assert planned.shells[0] is not None
    assert [ref() for ref in held] == [None, None]
