"""FlashAttention for Hopper in Gluon, the lower half of Triton: TMA loads, asynchronous wgmma, warps with roles of their own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util

import torch

from flash2.core.contract import Backend, Capability


class GluonHopper(Backend):
    """The project's own kernels for sm_90, fp16 and bf16; the fastest it has there."""

    name = "gluon"
    settled = True
    opaque = True
    capability = Capability(
        devices=("cuda",),
        precisions={"fp16": ("fp16",), "bf16": ("bf16",)},
        features=frozenset(("causal", "gqa", "cross", "window", "softcap", "scale", "empty-rows", "lse")),
        min_arch=(9, 0),
        max_arch=(9, 0),
        head_dims=range(1, 257),
        deterministic=False,  # dq is added up by float32 atomics, but above head_dim 128
        kernels=r"gluon_\w+",
    )

    def unavailable(self) -> str | None:
        """Triton missing or too old for Gluon, or no GPU to run it on."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'flash2-triton[triton]'"
        if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 6):
            return f"triton {importlib.metadata.version('triton')} is older than 3.6, the first with this Gluon"
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def version(self) -> str:
        """Triton's version: Gluon ships in it."""
        return f"triton {importlib.metadata.version('triton')}"

    def details(self, problem, device):
        """Each kernel's configuration, and what a tensor that TMA cannot describe costs."""
        lines = _launch().described(problem, device)
        if problem.pass_ != "fwd":
            lines += _gradients().described(problem, self.capability.deterministic)
        return lines

    def scratch_bytes(self, problem):
        """The backward's row statistics and, up to head_dim 128, sums of dq in 32 bits and what scales them."""
        return 0 if problem.pass_ == "fwd" else _gradients().scratch_bytes(problem, self.capability.deterministic)

    def forward(self, q, k, v, spec):
        """(o, lse), one kernel."""
        return _launch().attend(q, k, v, spec)

    def backward(self, do, q, k, v, o, lse, spec):
        """(dq, dk, dv): row statistics, the kernel that owns keys, and a kernel that owns queries or rounds dq."""
        return _gradients().differentiate(do, q, k, v, o, lse, spec, deterministic=self.capability.deterministic)


class GluonDeterministic(GluonHopper):
    """The same, bitwise reproducible: up to head_dim 128 dq is added up in fixed point, which no order of programs changes."""

    name = "gluon-deterministic"
    capability = dataclasses.replace(GluonHopper.capability, deterministic=True)


@functools.cache
def _launch():
    # Imports Triton, on first use; an import statement in every call would cost a tenth of the launch.
    from flash2.backends.gluon_hopper import launch

    return launch


@functools.cache
def _gradients():
    from flash2.backends.gluon_hopper import gradients

    return gradients
