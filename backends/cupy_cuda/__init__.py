"""FlashAttention-2 in CUDA C++, compiled at run time by NVRTC and loaded through CuPy: real .cu files, no build step."""

from __future__ import annotations

import functools
import importlib.util

import torch

from flash2.core.contract import Backend, Capability


class CupyCuda(Backend):
    """Hand-written CUDA kernels, forward and backward; deterministic."""

    name = "cupy"
    settled = True
    opaque = True
    capability = Capability(
        devices=("cuda",),
        precisions={"fp32": ("ieee", "tf32"), "fp16": ("fp16",), "bf16": ("bf16",)},
        features=frozenset(("causal", "gqa", "cross", "window", "softcap", "alibi", "scale", "empty-rows", "lse")),
        min_arch=(8, 0),
        head_dims=range(1, 257),
        kernels=r"cuda_(attention_forward|row_statistics|gradients(_(kv|q|sum))?)",
    )

    def __init__(self) -> None:
        self.pins: dict = {}

    def unavailable(self) -> str | None:
        """CuPy or NVRTC missing, or no GPU."""
        return _lacking()

    def version(self) -> str:
        """CuPy's version."""
        import importlib.metadata

        return next(
            (
                f"{name.partition('-')[0]} {importlib.metadata.version(name)}"
                for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy")
                if _installed(name)
            ),
            "cupy",
        )

    def pin(self, **texts: str) -> CupyCuda:
        """This backend with some kernels fixed to a tile, until unpinned by pin(): pin(forward="128x64 w4 s2").

        Kernels: forward, statistics, gradients_kv, gradients_q; gradients, gradients_sum. ValueError for another name or form.
        """
        launch = _launch()
        if unknown := sorted(set(texts) - set(launch.ENTRIES)):
            raise ValueError(f"unknown kernel {unknown[0]!r}; known: {', '.join(launch.ENTRIES)}")
        self.pins = {name: launch.parse_tile(text) for name, text in texts.items()}
        return self

    def details(self, problem, device):
        """Each kernel: its source, its tile, and the seconds that compiling it took."""
        return _launch().described(problem, device, self.pins)

    def scratch_bytes(self, problem):
        """The backward's row statistics and shares of dQ, and copies where rows are no multiples of 16 bytes."""
        statistics = 0 if problem.pass_ == "fwd" else 8 * problem.batch * problem.heads_q * (problem.seq_q + 128)
        statistics += 0 if problem.pass_ == "fwd" else _launch().bytes_of_shares(problem, self.pins)
        size = 4 if problem.dtype == "fp32" else 2
        if problem.head_dim * size % 16 == 0:
            return statistics
        rows_q = problem.heads_q * problem.seq_q * (1 if problem.pass_ == "fwd" else 3)
        padded = -(-problem.head_dim * size // 16) * 16
        return statistics + problem.batch * padded * (rows_q + 2 * problem.heads_kv * problem.seq_kv)

    def forward(self, q, k, v, spec):
        """(o, lse), one kernel."""
        return _launch().attend(q, k, v, spec, self.pins)

    def backward(self, do, q, k, v, o, lse, spec):
        """(dq, dk, dv), three kernels that add up in one order: bitwise reproducible."""
        return _launch().differentiate(do, q, k, v, o, lse, spec, self.pins)


@torch.compiler.assume_constant_result  # nothing here that a compiler could trace
@functools.cache
def _lacking() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; pip install 'flash2-triton[cupy]'"
    if not torch.cuda.is_available():
        return "no CUDA device"
    from flash2.backends.cupy_cuda import compile

    try:
        compile.nvrtc_version()
        compile.folder()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _launch():
    # On first use; an import statement in every call would cost a tenth of the launch.
    from flash2.backends.cupy_cuda import launch

    return launch
