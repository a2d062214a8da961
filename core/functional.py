"""attention(): validate -> empties -> device guard -> the backend, differentiable through one autograd.Function."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flash2.core import operators
from flash2.core.contract import DTYPE_NAMES, Backend, Spec, check_inputs
from flash2.core.problem import Problem, Window, check_window

T = TypeVar("T")


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
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        name, tensor = next((n, x) for n, x in zip("qkv", (q, k, v), strict=True) if not isinstance(x, torch.Tensor))
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    device_type = "cuda" if q.is_cuda else q.device.type
    autocast = torch.is_autocast_enabled(device_type)
    if autocast:
        low = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(low) if x.dtype == torch.float32 else x for x in (q, k, v))
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    admit = _admit_once if backend.settled and not torch.compiler.is_compiling() else _admit
    spec = admit(
        backend, q, k, v, alibi_slopes, bool(causal), None if scale is None else float(scale),
        None if window is None else check_window(window), float(softcap), None if precision is None else str(precision),
        needs_grad, return_lse,
    )  # fmt: skip
    # Cast once, above: not again inside a backend's float32 maths.
    with torch.autocast(device_type, enabled=False) if autocast else _NOTHING:
        o, lse = run(backend, q, k, v, spec, needs_grad=needs_grad)
    if not return_lse:
        return o
    assert lse is not None, f"{backend.name} declares lse and returned none"
    return o, lse


def _admit(backend, q, k, v, alibi_slopes, causal, scale, window, softcap, precision, needs_grad, lse) -> Spec:
    """The Spec of a call that makes sense and that `backend` can run; raises for any other."""
    problem, spec = check_inputs(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, precision=precision or default_precision(backend, q),
    )  # fmt: skip
    if needs_grad:
        problem = problem.replace(pass_="fwd+bwd")
    refuse_unsupported(backend, problem, q.device, lse=lse)
    return dataclasses.replace(spec, lse=True) if lse else spec


# What a settled backend admitted: every check of _admit reads no more of a call than its key holds. The entry
# holds the backend too, so that its id stays its own.
_admitted: dict[tuple, tuple[Backend, Spec]] = {}
_ADMITTED_LIMIT = 1 << 12  # a decoder's seq_kv grows for ever


def _admit_once(backend, q, k, v, alibi_slopes, *options) -> Spec:
    """_admit(), remembered: the checks cost more host time than a launch."""
    slopes = alibi_slopes
    key = (
        id(backend), q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, options,
        None if slopes is None else (slopes.shape, slopes.dtype, slopes.device, slopes.requires_grad),
    )  # fmt: skip
    known = _admitted.get(key)
    if known is None:
        spec = _admit(backend, q, k, v, alibi_slopes, *options)
        if len(_admitted) >= _ADMITTED_LIMIT:
            _admitted.clear()
        known = _admitted[key] = backend, dataclasses.replace(spec, alibi_slopes=None)
    spec = known[1]
    return spec if slopes is None else dataclasses.replace(spec, alibi_slopes=slopes)


_constants: dict[tuple, Any] = {}


def constant(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments). torch.compile does not trace the call: it makes it once, and its graph reads the result."""
    if not torch.compiler.is_compiling():
        return function(*arguments)
    _call(function, *arguments)
    return _constants[function, arguments]


@torch.compiler.assume_constant_result
def _call(function, *arguments) -> bool:
    _constants[function, arguments] = function(*arguments)
    return True  # an object made here would be one that the graph cannot guard


def default_precision(backend: Backend, q: torch.Tensor) -> str | None:
    """The class `backend` computes q's dtype in unless asked otherwise; None if it does not take it."""
    classes = backend.classes(DTYPE_NAMES.get(q.dtype, ""), q.device)
    return classes[0] if classes else None


def refuse_unsupported(backend: Backend, problem: Problem, device: torch.device, *, lse: bool = False) -> None:
    """Raise, in words, unless `backend` can run `problem` on `device`."""
    if (reason := _unavailable(backend, device)) is not None:
        raise RuntimeError(f"backend {backend.name!r} is unavailable: {reason}")
    reasons = backend.why_not(problem, device)
    if lse and "lse" not in backend.capability_on(device).features:
        reasons = [*reasons, "no lse (return_lse=True)"]
    if reasons:
        raise NotImplementedError(f"backend {backend.name!r} cannot run {problem.key()}: {'; '.join(reasons)}")


def _unavailable(backend: Backend, device: torch.device) -> str | None:
    if not (backend.opaque and torch.compiler.is_compiling()):
        return backend.unavailable()
    if operators.identity(backend.name, device.type) != id(backend):
        return "in a compiled graph it goes by its name, which stands for no such backend; register_backend() it first"
    return operators.unavailable(backend.name, device.type)


def run(
    backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, *, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(o, lse) of a validated call; what attention() and the harness both go through."""
    if q.numel() == 0 or k.numel() == 0:
        return _empty(q, k, v)
    if spec.window is not None and (hidden := hidden_keys(spec, q.shape[2], k.shape[2])):
        k, v = k[:, :, hidden:], v[:, :, hidden:]  # bottom-right alignment does not move
    if backend.opaque and torch.compiler.is_compiling():
        return operators.attend(backend, q, k, v, spec)
    with _on_device(q):
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


_NOTHING = contextlib.nullcontext()


def _on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    # Kernels launch on the current device; the tensors decide which that is. To enter the one that is current would
    # cost a fifth of a call, and a compiled graph takes care of its devices itself.
    if not x.is_cuda or torch.compiler.is_compiling() or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


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
        with torch.no_grad(), _on_device(q):
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
