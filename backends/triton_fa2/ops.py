"""The kernels as operators of torch, flash2::triton_fwd and flash2::triton_bwd, which torch.compile can trace.

A Spec travels as plain arguments, because an operator's schema knows no other. Eager calls do not come this
way: the dispatcher and its Python shims cost a call more host time than the launch itself.
"""

from __future__ import annotations

import torch

from flash2.backends.triton_fa2 import launch
from flash2.core.contract import Spec

OPTIONS = "Tensor? alibi_slopes, float scale, str precision, bool causal, int? left, int? right, float softcap"
LIBRARY = torch.library.Library("flash2", "FRAGMENT")
LIBRARY.define(f"triton_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor o, Tensor lse)")
LIBRARY.define(
    f"triton_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """launch.attend as an operator: (o, lse), of which o is differentiable."""
    left, right = spec.window or (None, None)
    return torch.ops.flash2.triton_fwd(
        q, k, v, spec.alibi_slopes, spec.scale, spec.precision, spec.causal, left, right, spec.softcap
    )


def to_spec(alibi_slopes, scale, precision, causal, left, right, softcap) -> Spec:
    """The Spec that the OPTIONS stand for."""
    window = None if left is None and right is None else (left, right)
    return Spec(
        scale=scale, precision=precision, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes
    )


def _fwd(q, k, v, *options):
    with torch.cuda.device_of(q):
        return launch.attend(q, k, v, to_spec(*options))


def _bwd(do, q, k, v, o, lse, *options):
    with torch.cuda.device_of(q):
        return launch.differentiate(do, q, k, v, o, lse, to_spec(*options))


def _fwd_like(q, k, v, *options):
    return launch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_like(do, q, k, v, o, lse, *options):
    return tuple(launch.empty_like(x) for x in (q, k, v))


def _save_fwd(ctx, inputs, output):
    q, k, v, alibi_slopes, *options = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _differentiate_fwd(ctx, do, _dlse):
    *tensors, alibi_slopes = ctx.saved_tensors
    return *torch.ops.flash2.triton_bwd(do, *tensors, alibi_slopes, *ctx.options), *(None for _ in range(7))


def _save_nothing(ctx, inputs, output):
    pass  # the second derivative is refused, whatever it would need


def _differentiate_bwd(ctx, *_):
    raise RuntimeError("attention has no second derivative: its backward cannot itself be differentiated")


for _name, _run, _like, _save, _differentiate in (
    ("triton_fwd", _fwd, _fwd_like, _save_fwd, _differentiate_fwd),
    ("triton_bwd", _bwd, _bwd_like, _save_nothing, _differentiate_bwd),
):
    for _device in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"flash2::{_name}", _like, lib=LIBRARY)
    torch.library.register_autograd(f"flash2::{_name}", _differentiate, setup_context=_save, lib=LIBRARY)
