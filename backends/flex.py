"""FlexAttention: torch compiles one fused kernel per problem from a mask and a score function.

Dynamo stops compiling a function after `torch._dynamo.config.recompile_limit` shapes and runs it eagerly from
then on, which for FlexAttention means whole score matrices. Here every problem class compiles a code object of
its own, so the limit is not met; and the function refuses to be run by anything but the compiler.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from flash2.core.contract import Backend, Capability
from flash2.core.problem import Window

HALF = {"fp16": ("fp16",), "bf16": ("bf16",)}
FEATURES = frozenset({"causal", "gqa", "cross", "window", "softcap", "alibi", "scale", "empty-rows"})


class Flex(Backend):
    """torch.compile(flex_attention), specialised to each shape; the first call of a shape compiles for seconds."""

    name = "flex"
    autograd = True
    compiles_per_shape = True
    on: ClassVar[dict[str, Capability]] = {
        "cpu": Capability(  # torch's C++ template: inference only, and it returns no lse
            devices=("cpu",),
            precisions={"fp32": ("ieee",), **HALF},
            features=FEATURES,
            backward=False,
            kernels="CompiledFxGraph|Torch-Compiled|flex_attention",
        ),
        "cuda": Capability(
            devices=("cuda",),
            precisions={"fp32": ("ieee", "tf32"), **HALF},
            features=FEATURES | {"lse"},
            min_arch=(8, 0),
            head_dims=range(16, 257),  # tl.dot takes no fewer than 16
            kernels="triton_",
        ),
    }

    def __init__(self) -> None:
        self.capability = Capability(
            devices=("cpu", "cuda"),
            precisions=self.on["cuda"].precisions,
            features=self.on["cuda"].features,
            kernels="|".join(str(capability.kernels) for capability in self.on.values()),
        )
        self._compiled: dict[tuple, Callable] = {}
        self._masks: dict[tuple, object] = {}

    def capability_on(self, device):
        """On the CPU there is neither a backward nor an lse."""
        return self.on.get(device.type, self.capability)

    def unavailable(self):
        """Both of torch's compilers, C++ on the CPU and Triton on CUDA, need a compiler and Python's headers."""
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            return "torch.compile is switched off by TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE; unset it"
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), "g++", "clang++") if compiler):
            return "torch.compile needs a C++ compiler; install g++ (apt-get install g++) or point CXX at one"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            return "torch.compile needs Python's headers (Python.h); install python3-dev"
        return None

    def why_not(self, problem, device):
        """The declared gaps, and a CPU whose vectors torch's C++ template does not know."""
        reasons = super().why_not(problem, device)
        if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
            reasons.append("a CPU without AVX2, which FlexAttention's C++ template needs")
        return reasons

    def forward(self, q, k, v, spec):
        """(o, lse) by the kernel compiled for this problem class; lse None on the CPU."""
        if q.device.type == "cpu":  # it refuses tensors that require a gradient, though none is recorded here
            q, k, v = q.detach(), k.detach(), v.detach()
        mask = None if spec.band == (None, None) else self._block_mask(spec.band, q.shape[2], k.shape[2], q.device)
        slopes = spec.alibi_slopes
        if slopes is not None:
            slopes = slopes.detach().expand(q.shape[0], q.shape[1])
        key = (
            *(_guarded(x) for x in (q, k, v)), torch.is_grad_enabled(), spec.band, spec.softcap, spec.scale,
            spec.precision, slopes is not None and slopes.stride(), str(q.device),
        )  # fmt: skip
        if key not in self._compiled:
            self._compiled[key] = _compile(spec.precision)
        o, lse = self._compiled[key](q, k, v, mask, slopes, float(spec.softcap), float(spec.scale))
        return o, None if lse is None else lse.detach()

    def _block_mask(self, band: Window, seq_q: int, seq_kv: int, device: torch.device):
        key = (band, seq_q, seq_kv, str(device))
        if key not in self._masks:
            left, right = band
            offset = seq_kv - seq_q

            def visible(_batch, _head, i, j):
                keep = j >= 0
                if left is not None:
                    keep = keep & (j >= i + (offset - left))
                if right is not None:
                    keep = keep & (j <= i + (offset + right))
                return keep

            self._masks[key] = create_block_mask(visible, None, None, seq_q, seq_kv, device=device)
        return self._masks[key]


def _attend(q, k, v, mask, slopes, softcap, scale, precision):
    """(o, lse) of flex_attention, traced by the compiler; lse None on the CPU."""
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError("FlexAttention was about to run eagerly, without its fused kernel; a row of it would lie")
    offset = k.shape[2] - q.shape[2]

    def score(s, batch, head, i, j):
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if slopes is not None:
            s = s - slopes[batch, head] * (j - i - offset).abs()
        return s

    gqa = q.shape[1] != k.shape[1]
    changed = score if softcap or slopes is not None else None
    if q.device.type == "cpu":
        return flex_attention(q, k, v, changed, mask, scale, gqa), None
    # Left to itself the template takes the class from torch's global setting.
    options = {"FLOAT32_PRECISION": f"'{precision}'"} if q.dtype == torch.float32 else None
    aux = AuxRequest(lse=True)
    o, extra = flex_attention(q, k, v, changed, mask, scale, gqa, kernel_options=options, return_aux=aux)
    return o, extra.lse


def _compile(precision: str) -> Callable:
    # Dynamo counts recompilations by code object, so this one gets its own. fullgraph: no part runs eagerly.
    own = types.FunctionType(_attend.__code__.replace(), globals(), f"flex_{precision}")

    def attend(q, k, v, mask, slopes, softcap, scale):
        return compiled(q, k, v, mask, slopes, softcap, scale, precision)

    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    return attend


def _guarded(x: torch.Tensor) -> tuple:
    # What Dynamo specialises a tensor argument on; a difference here would recompile.
    return x.dtype, x.shape, x.stride(), x.requires_grad, x.data_ptr() % 16 == 0
