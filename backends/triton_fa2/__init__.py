"""FlashAttention-2 in the Triton language: forward and backward, sm_80 and newer, and Triton's interpreter on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os

import torch

from flash2.core.contract import Backend, Capability

# Set before Triton is imported, this runs the kernels on the CPU, for tests: slow, and exact in their semantics.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


class TritonFA2(Backend):
    """The project's own portable kernel; deterministic, forward and backward."""

    name = "triton"
    settled = True
    opaque = True
    capability = Capability(
        devices=("cuda", "cpu") if INTERPRET else ("cuda",),
        # bf16x6 is more exact than ieee's own fma chains on this hardware, and faster: docs/performance.md
        precisions={
            "fp32": ("bf16x6", "ieee", "tf32", "tf32x3", "bf16x3"),
            "fp16": ("fp16",),
            "bf16": ("bf16",),
        },
        features=frozenset(("causal", "gqa", "cross", "window", "softcap", "alibi", "scale", "empty-rows", "lse")),
        min_arch=(8, 0),
        head_dims=range(1, 257),
        kernels=r"attention_forward|row_statistics|gradients_(kv|q)",
    )

    def capability_on(self, device: torch.device) -> Capability:
        """The interpreter has one class of float32 maths: plain float32."""
        if device.type != "cpu":
            return self.capability
        return dataclasses.replace(self.capability, precisions={**self.capability.precisions, "fp32": ("ieee",)})

    def unavailable(self) -> str | None:
        """Triton missing, or no GPU to run it on (and no interpreter asked for)."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'flash2-triton[triton]'"
        if not INTERPRET and not torch.cuda.is_available():
            return "no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests"
        return None

    def version(self) -> str:
        """Triton's version."""
        import triton

        return f"triton {triton.__version__}"

    def __init__(self) -> None:
        self.pins: dict = {}

    def pin(self, **texts: str) -> TritonFA2:
        """This backend with some kernels fixed to a configuration, until unpinned by pin(): pin(fwd="64x128 w4 s2 tma").

        Kernels: fwd, dkdv, dk, dv, dq. Raises ValueError for another name or a configuration that is none. What the
        compiler cannot build is raised by the call that needs it. A graph of torch.compile runs with the pins that
        get_backend("triton") has at the time.
        """
        from flash2.backends.triton_fa2 import configs

        self.pins = configs.parse_pins("; ".join(f"{kernel}={text}" for kernel, text in texts.items()))
        return self

    def details(self, problem, device):
        """Each kernel's configuration and where it comes from."""
        found = _launch().configurations(problem, device, self.pins)
        return [f"{kernel}: {config} ({source})" for kernel, (config, source) in found.items()]

    def scratch_bytes(self, problem):
        """The backward's row statistics, and bfloat16 parts of two tensors where float32 is split beforehand."""
        statistics = 0 if problem.pass_ == "fwd" else 8 * problem.batch * problem.heads_q * (problem.seq_q + 128)
        parts = {"bf16x3": 2, "bf16x6": 3, "tf32": 2}.get(problem.precision or "", 0)
        rows = problem.heads_kv * problem.seq_kv
        if problem.pass_ != "fwd":
            rows = max(rows, problem.heads_q * problem.seq_q)
        return statistics + 2 * 2 * parts * problem.batch * rows * problem.head_dim

    def forward(self, q, k, v, spec):
        """(o, lse), one kernel."""
        return _launch().attend(q, k, v, spec, self.pins)

    def backward(self, do, q, k, v, o, lse, spec):
        """(dq, dk, dv), three kernels, no atomics: bitwise reproducible."""
        return _launch().differentiate(do, q, k, v, o, lse, spec, self.pins)


@functools.cache
def _launch():
    # Imports Triton, on first use; an import statement in every call would cost a tenth of the launch.
    from flash2.backends.triton_fa2 import launch

    return launch
