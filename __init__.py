"""Flash2-Triton: every way to write attention in Python behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash2 import core
from flash2.backends import default_backend, get_backend, list_backends, register_backend
from flash2.core.problem import Problem, Window

if TYPE_CHECKING:
    import torch

    from flash2.core.contract import Backend

__all__ = ["Problem", "attention", "get_backend", "list_backends", "register_backend"]
__version__ = "0.1.0"
_functional = None


def _find_backend(name: str | None, device_type: str) -> Backend:
    return get_backend(name or default_backend(device_type))


core.find_backend = _find_backend


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
    backend: str | Backend | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention by the named backend; differentiable. See flash2.core.functional.attention.

    `backend` is a name from list_backends(), a Backend, or None for the device's default
    (backends.DEFAULTS). A backend that cannot run the problem raises; none is tried instead.
    """
    global _functional
    if _functional is None:  # torch is imported on first use, not with the package
        from flash2.core import functional as _functional
    if backend is None or isinstance(backend, str):
        backend = _functional.constant(get_backend, backend or default_backend(q.device.type))
    return _functional.attention(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        precision=precision, backend=backend, return_lse=return_lse,
    )  # fmt: skip
