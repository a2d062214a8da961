"""A backend as operators of torch, flash2::attention and flash2::attention_backward, for torch.compile.

Launchers written in Python (pointers, descriptors, caches) cannot be traced. In a compiled graph such a backend
(Backend.opaque) stands under its name, and a Spec as plain arguments: an operator's schema knows no objects, and a
compiled graph may be kept for another process. Eager calls do not come this way: torch's dispatcher and its Python
shims cost a call more host time than the launch itself.
"""

from __future__ import annotations

import torch

from flash2 import core
from flash2.core.contract import Backend, Spec

OPTIONS = (
    "str backend, Tensor? alibi_slopes, float scale, str precision, bool causal, int? left, int? right, float softcap"
)
LIBRARY = torch.library.Library("flash2", "FRAGMENT")
LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor o, Tensor lse)")
LIBRARY.define(
    f"attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


def attend(
    backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) by `backend`, differentiable in q, k and v."""
    left, right = spec.window or (None, None)
    return torch.ops.flash2.attention(
        q, k, v, backend.name, spec.alibi_slopes, spec.scale, spec.precision, spec.causal, left, right, spec.softcap
    )


@torch.compiler.assume_constant_result
def identity(name: str, device_type: str) -> int | None:
    """id() of the backend that an operator would find under `name`."""
    try:
        return id(core.find_backend(name, device_type))
    except (ValueError, ImportError):
        return None


@torch.compiler.assume_constant_result
def unavailable(name: str, device_type: str) -> str | None:
    """Backend.unavailable() of the one called `name`."""
    return core.find_backend(name, device_type).unavailable()


def to_spec(alibi_slopes, scale, precision, causal, left, right, softcap) -> Spec:
    """The Spec that the OPTIONS after the backend stand for."""
    window = None if left is None and right is None else (left, right)
    return Spec(
        scale=scale, precision=precision, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        lse=True,
    )  # fmt: skip


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _laid_out(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # A graph is compiled for the strides that the fake tensors had; a backend may pad its rows.
    strides = torch.empty_like(x, device="meta").stride()
    return out if out.stride() == strides else _like(x).copy_(out)


def _forward(q, k, v, name, *options):
    with torch.cuda.device_of(q):
        o, lse = core.find_backend(name, q.device.type).forward(q, k, v, to_spec(*options))
    return _laid_out(o, q), lse


def _backward(do, q, k, v, o, lse, name, *options):
    with torch.cuda.device_of(q):
        grads = core.find_backend(name, q.device.type).backward(do, q, k, v, o, lse, to_spec(*options))
    return tuple(_laid_out(grad, x) for grad, x in zip(grads, (q, k, v), strict=True))


def _forward_like(q, k, v, *_):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_like(do, q, k, v, *_):
    return _like(q), _like(k), _like(v)


def _save_forward(ctx, inputs, output):
    q, k, v, name, alibi_slopes, *options = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes)
    ctx.name, ctx.options = name, options
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do, _dlse):
    *tensors, alibi_slopes = ctx.saved_tensors
    grads = torch.ops.flash2.attention_backward(do, *tensors, ctx.name, alibi_slopes, *ctx.options)
    return *grads, *(None for _ in range(8))


def _save_nothing(ctx, inputs, output):
    pass  # the second derivative is refused, whatever it would need


def _refuse(ctx, *_):
    raise RuntimeError("attention has no second derivative: its backward cannot itself be differentiated")


for _name, _run, _fake, _save, _derivative in (
    ("attention", _forward, _forward_like, _save_forward, _differentiate),
    ("attention_backward", _backward, _backward_like, _save_nothing, _refuse),
):
    for _device in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"flash2::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"flash2::{_name}", _derivative, setup_context=_save, lib=LIBRARY)
