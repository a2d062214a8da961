"""The flash-attention packages of Dao et al.: fa2 (flash-attn), fa3 (flash_attn_interface, Hopper), fa4 (flash-attn-4).

They take (batch, seq, heads, head_dim) of any strides with dense rows, so q, k, v go in, and o and the gradients come
out, as transposed views: no layout is converted, inside or outside of what is timed. What their kernels read wrong
(rows that are not dense, strides that are 0 or no multiple of 16 bytes) is copied first. Causal masks and windows of
all three are aligned to the bottom right (flash-attention >= 2.1), as the contract's are.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch

from flash2.core.contract import Backend, Capability

HALF = {"fp16": ("fp16",), "bf16": ("bf16",)}
FEATURES = frozenset({"causal", "gqa", "cross", "window", "softcap", "scale", "lse"})
GRID_LIMIT = 65535  # of the second and third axis of a CUDA grid


class FlashAttention(Backend):
    """What the packages have in common."""

    autograd = True
    distributions: tuple[str, ...]  # any of these brings the module
    remedy: str

    def unavailable(self) -> str | None:
        """The package is missing, or there is no device for its kernels."""
        if self._distribution() is None:
            return f"{self.distributions[0]} is not installed; {self.remedy}"
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def version(self) -> str:
        """The package's version."""
        name = self._distribution()
        return f"{self.distributions[0]} {importlib.metadata.version(name) if name else '(not installed)'}"

    def why_not(self, problem, device):
        """The declared gaps, and what the kernels get wrong without saying so."""
        reasons = super().why_not(problem, device)
        if problem.scale is not None and problem.scale <= 0:
            reasons.append("scale <= 0: the kernel scales the row maximum afterwards and returns NaN")
        return reasons

    def forward(self, q, k, v, spec):
        """(o, lse) by the package's own kernels."""
        q, k, v = (readable(x).transpose(1, 2) for x in (q, k, v))
        o, lse = self.attend(q, k, v, spec)
        o = o.transpose(1, 2)
        if o.requires_grad:
            o.register_hook(readable)  # a sum's gradient arrives with stride 0
        return o, lse.detach()

    def attend(self, q, k, v, spec) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse) of tensors in the package's layout: o (batch, seq, heads, head_dim), lse (batch, heads, seq)."""
        raise NotImplementedError

    def _distribution(self) -> str | None:
        for name in self.distributions:
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            return name
        return None


class FA2(FlashAttention):
    """FlashAttention-2, CUDA, for Ampere and later."""

    name = "fa2"
    distributions = ("flash-attn",)
    remedy = "pip install flash-attn --no-build-isolation (builds for an hour)"
    capability = Capability(
        devices=("cuda",),
        precisions=HALF,
        features=FEATURES | {"alibi"},
        min_arch=(8, 0),
        deterministic=False,  # the backward adds dq atomically
        kernels="flash_(fwd|bwd)|flash::",
    )

    def why_not(self, problem, device):
        """Also a batch or heads that its grid does not hold."""
        reasons = super().why_not(problem, device)
        if max(problem.batch, problem.heads_q) > GRID_LIMIT:
            reasons.append(f"batch or heads above {GRID_LIMIT}: the kernel puts them on a grid axis that holds no more")
        return reasons

    def attend(self, q, k, v, spec):
        """flash_attn_func; dropout 0 makes it return the lse without a score matrix."""
        o, lse, _ = _fa2()(
            q, k, v, dropout_p=0.0, softmax_scale=spec.scale, causal=spec.causal, window_size=closed(spec.band),
            softcap=spec.softcap, alibi_slopes=spec.alibi_slopes, return_attn_probs=True,
        )  # fmt: skip
        return o, lse


class FA3(FlashAttention):
    """FlashAttention-3, CUDA, for Hopper."""

    name = "fa3"
    distributions = ("flash-attn-3", "flash_attn_3")
    remedy = "build it from flash-attention's hopper/ folder"
    capability = Capability(
        devices=("cuda",),
        precisions=HALF,
        features=FEATURES,
        min_arch=(9, 0),
        max_arch=(9, 0),
        head_dims=range(8, 257, 8),
        deterministic=False,
        kernels="flash",
    )

    def attend(self, q, k, v, spec):
        """flash_attn_func; versions before return_attn_probs always return the lse too."""
        function, wants_to_be_asked = _fa3()
        asked = {"return_attn_probs": True} if wants_to_be_asked else {}
        o, lse = function(
            q, k, v, softmax_scale=spec.scale, causal=spec.causal, window_size=closed(spec.band), softcap=spec.softcap,
            **asked,
        )[:2]  # fmt: skip
        return o, lse


class FA4(FlashAttention):
    """FlashAttention-4, written in the CuTe DSL of CUTLASS, for Hopper and Blackwell. Compiles at its first calls."""

    name = "fa4"
    distributions = ("flash-attn-4",)
    remedy = "pip install 'flash2-triton[peers]'"
    capability = Capability(
        devices=("cuda",),
        precisions=HALF,
        features=FEATURES,
        min_arch=(9, 0),
        head_dims=range(8, 257, 8),
        deterministic=False,
        kernels="flash_?attn|flash_?(fwd|bwd)|FlashAttention",
    )

    def why_not(self, problem, device):
        """Also the head_dims above 128 that it has for Hopper alone."""
        reasons = super().why_not(problem, device)
        wide = problem.head_dim > 128 and problem.head_dim != 256
        if device.type == "cuda" and wide and torch.cuda.get_device_capability(device) >= (10, 0):
            reasons.append(f"head_dim {problem.head_dim} (on Blackwell it has up to 128, and 256)")
        return reasons

    def attend(self, q, k, v, spec):
        """flash_attn.cute's flash_attn_func."""
        o, lse = _fa4()(
            q, k, v, softmax_scale=spec.scale, causal=spec.causal, window_size=spec.band, softcap=spec.softcap,
            return_lse=True,
        )  # fmt: skip
        return o, lse


def closed(band: tuple[int | None, int | None]) -> tuple[int, int]:
    """The band with -1 for an open end."""
    left, right = (-1 if end is None else end for end in band)
    return left, right


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a dense copy (differentiable) where rows are not dense, or an address or stride is 0 or not of 16 bytes."""
    lanes = 16 // x.element_size()
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step and step % lanes == 0 for step in steps)
    return x if dense else x.clone(memory_format=torch.contiguous_format)


# Imported on first use: an import statement in every call would be part of what is timed.


@functools.cache
def _fa2() -> Callable:
    from flash_attn import flash_attn_func

    return flash_attn_func


@functools.cache
def _fa3() -> tuple[Callable, bool]:
    import inspect

    from flash_attn_interface import flash_attn_func

    return flash_attn_func, "return_attn_probs" in inspect.signature(flash_attn_func).parameters


@functools.cache
def _fa4() -> Callable:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func
