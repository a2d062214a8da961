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
Options = tuple[torch.Tensor | None, float, str, bool, int | None, int | None, float]


def to_options(spec: Spec) -> Options:
    """The operators' arguments for `spec`."""
    left, right = spec.window or (None, None)
    return spec.alibi_slopes, spec.scale, spec.precision, spec.causal, left, right, spec.softcap


def to_spec(alibi_slopes, scale, precision, causal, left, right, softcap) -> Spec:
    """Inverse of to_options."""
    window = None if left is None and right is None else (left, right)
    return Spec(
        scale=scale, precision=precision, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes
    )


def triton_fwd(q, k, v, *options):
    """(o, lse); launch.attend with its Spec spelled out."""
    with torch.cuda.device_of(q):
        return launch.attend(q, k, v, to_spec(*options))


def triton_bwd(do, q, k, v, o, lse, *options):
    """(dq, dk, dv); launch.differentiate with its Spec spelled out."""
    with torch.cuda.device_of(q):
        return launch.differentiate(do, q, k, v, o, lse, to_spec(*options))


def _fwd_like(q, k, v, *options):
    return torch.empty_like(launch.rows_dense(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_like(do, q, k, v, o, lse, *options):
    return tuple(torch.empty_like(launch.rows_dense(x)) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, alibi_slopes, *options = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do, _dlse):
    q, k, v, o, lse, alibi_slopes = ctx.saved_tensors
    grads = torch.ops.flash2.triton_bwd(do, q, k, v, o, lse, alibi_slopes, *ctx.options)
    return *grads, *(None for _ in range(7))


for _name, _kernel, _like in (("triton_fwd", triton_fwd, _fwd_like), ("triton_bwd", triton_bwd, _bwd_like)):
    for _device in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _kernel, _device)
    torch.library.register_fake(f"flash2::{_name}", _like, lib=LIBRARY)
torch.library.register_autograd("flash2::triton_fwd", _differentiate, setup_context=_save, lib=LIBRARY)
