"""attention(): validate -> empties -> device guard -> the backend, differentiable through one autograd.Function."""

from __future__ import annotations

import contextlib

import torch

from flash2.core.contract import DTYPE_NAMES, Backend, Spec, check_inputs
from flash2.core.problem import Problem, Window


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    precision: str | None = None,
    backend: Backend,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(mask(softcap(q k^T * scale) + alibi)) v by `backend`, which never falls back to another.

    q (batch, heads_q, seq_q, head_dim); k, v (batch, heads_kv, seq_kv, head_dim), heads_q a multiple
    of heads_kv; one dtype, one device, any strides. Returns o like q, or (o, lse) with lse
    (batch, heads_q, seq_q) in natural log, float32 (fp64: float64), not differentiable. Under autocast q, k, v are cast first.

    Raises TypeError or ValueError for arguments that make no sense, RuntimeError when the backend is
    unavailable, NotImplementedError, with every reason, when it does not support the problem.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(low) if x.dtype == torch.float32 else x for x in (q, k, v))
    precision = precision or default_precision(backend, q)
    problem, spec = check_inputs(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, precision=precision,
    )  # fmt: skip
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad:
        problem = problem.replace(pass_="fwd+bwd")
    refuse_unsupported(backend, problem, q.device, lse=return_lse)
    with torch.autocast(q.device.type, enabled=False):  # cast once, above: not again inside a backend's float32 maths
        o, lse = run(backend, q, k, v, spec, needs_grad=needs_grad)
    if not return_lse:
        return o
    assert lse is not None, f"{backend.name} declares lse and returned none"
    return o, lse


def default_precision(backend: Backend, q: torch.Tensor) -> str | None:
    """The class `backend` computes q's dtype in unless asked otherwise; None if it does not take it."""
    classes = backend.classes(DTYPE_NAMES.get(q.dtype, ""), q.device)
    return classes[0] if classes else None


def refuse_unsupported(backend: Backend, problem: Problem, device: torch.device, *, lse: bool = False) -> None:
    """Raise, in words, unless `backend` can run `problem` on `device`."""
    if (reason := backend.unavailable()) is not None:
        raise RuntimeError(f"backend {backend.name!r} is unavailable: {reason}")
    reasons = backend.why_not(problem, device)
    if lse and "lse" not in backend.capability_on(device).features:
        reasons = [*reasons, "no lse (return_lse=True)"]
    if reasons:
        raise NotImplementedError(f"backend {backend.name!r} cannot run {problem.key()}: {'; '.join(reasons)}")


def run(
    backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, *, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(o, lse) of a validated call; what attention() and the harness both go through."""
    if q.numel() == 0 or k.numel() == 0:
        return _empty(q, k, v)
    if spec.window is not None and (hidden := hidden_keys(spec, q.shape[2], k.shape[2])):
        k, v = k[:, :, hidden:], v[:, :, hidden:]  # bottom-right alignment does not move
    with _on_device(q.device):
        if backend.autograd or not needs_grad:
            return backend.forward(q, k, v, spec)
        return _Attention.apply(q, k, v, spec, backend)


def hidden_keys(spec: Spec, seq_q: int, seq_kv: int) -> int:
    """How many leading keys no query sees: the sliding window of the first query begins after them.
    Cut off here, they cost no backend any work and can reach no result, whatever they hold."""
    left, _ = spec.band
    return 0 if left is None else min(max(seq_kv - seq_q - left, 0), seq_kv - 1)


def _empty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # No query or no key: nothing to launch. o = 0 (connected, so that gradients are zeros), lse = -inf.
    o = q * 0 + (k.sum() + v.sum()) * 0
    o = torch.where(torch.isnan(o), torch.zeros_like(o), o)
    return o, torch.full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    # Kernels launch on the current device; the tensors decide which that is.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spec: Spec, backend: Backend):
        o, lse = backend.forward(q, k, v, spec)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.spec, ctx.backend = spec, backend
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own signature is *args
        q, k, v, o, lse = ctx.saved_tensors
        with torch.no_grad(), _on_device(q.device):
            grads = ctx.backend.backward(do, q, k, v, o, lse, ctx.spec)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _NoSecondDerivative.apply(do, q, k, v, *grads)
        return *grads, None, None


class _NoSecondDerivative(torch.autograd.Function):
    # torch's once_differentiable lets the gradients pass for constants where do is one: a gradient penalty
    # would silently lose its term. These depend on q, k and v, and raise when asked how.
    @staticmethod
    def forward(ctx, do, q, k, v, dq, dk, dv):
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("attention has no second derivative: its backward cannot itself be differentiated")
