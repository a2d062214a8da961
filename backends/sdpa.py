"""torch's scaled_dot_product_attention: its own choice of kernel, and one pinned kernel per name.

SDPA aligns `is_causal` to the top left, the contract to the bottom right; `plan` translates. A pinned
kernel that torch will not run is refused with torch's own reasons; another one never takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flash2.core.contract import DTYPE_NAMES, TORCH_DTYPES, Backend, Capability, tf32_mismatch
from flash2.core.problem import Problem, Window

ANY_HEAD_DIM = range(1, 1 << 16)
# What SDPA can be told. It has no softcap; ALiBi would be a bias in q's dtype, rounded to bf16 or fp16.
FEATURES = frozenset({"causal", "gqa", "cross", "window", "scale", "empty-rows"})
HALF = {"fp16": ("fp16",), "bf16": ("bf16",)}
CPU = Capability(
    devices=("cpu",),
    precisions={"fp64": ("fp64",), "fp32": ("ieee",), **HALF},
    features=FEATURES,
    head_dims=ANY_HEAD_DIM,
    kernels="scaled_?dot_?product_?(flash_?)?attention(_?for_?cpu|$)",  # torch's operators, forward and backward
)


GRID_LIMIT = 65535  # of the second and third axis of a CUDA grid
INDEX_LIMIT = 2**31 - 1  # of a signed 32-bit offset


class Sdpa(Backend):
    """scaled_dot_product_attention as torch dispatches it, except that fp32 on CUDA stays with one class of maths."""

    name = "sdpa"
    autograd = True
    kernel: SDPBackend | None = None  # the one kernel that may run; None: torch chooses
    on: ClassVar[dict[str, Capability]] = {
        "cpu": dataclasses.replace(CPU, kernels=None),
        "cuda": Capability(
            devices=("cuda",),
            # torch's choice for fp32 on CUDA is the efficient kernel, 3xTF32; the math one is sdpa-math.
            precisions={"fp64": ("fp64",), "fp32": ("tf32x3",), **HALF},
            features=FEATURES,
            head_dims=ANY_HEAD_DIM,
            deterministic=False,
        ),
    }

    def __init__(self) -> None:
        self.capability = _union(list(self.on.values()))

    def capability_on(self, device):
        """The kernels of the CPU and of CUDA differ in dtypes, features and determinism."""
        return self.on.get(device.type, self.capability)

    def unavailable(self):
        """A kernel for CUDA alone needs a CUDA build of torch and a device."""
        if "cpu" in self.on or torch.cuda.is_available():
            return None
        build = "sees no CUDA device" if torch.version.cuda else "is built without CUDA"
        return f"needs a CUDA device; torch {torch.__version__} {build}"

    def why_not(self, problem, device):
        """The declared gaps, float32 maths torch is not set to do, and what torch's own dispatcher objects to."""
        reasons = super().why_not(problem, device)
        capability = self.capability_on(device)
        if device.type not in self.on or problem.precision not in capability.precisions.get(problem.dtype, ()):
            return reasons
        kernel = self._kernel(problem.dtype, device)
        if device.type == "cuda" and problem.dtype == "fp32" and kernel == SDPBackend.MATH:
            reasons += tf32_mismatch(problem.precision)
        if not all((problem.batch, problem.seq_q, problem.seq_kv)):
            return reasons  # nothing is launched for an empty tensor
        empty, form = plan(problem.band, problem.seq_q, problem.seq_kv)
        if form == "lower-right" and not _native(kernel, device, problem.heads_q, problem.heads_kv):
            form = "mask"
        if form == "mask" and kernel == SDPBackend.CUDNN_ATTENTION and problem.pass_ != "fwd":
            reasons.append("backward with a mask: cuDNN returns NaN in dq at some lengths (pytorch#196678)")
        if device.type == "cuda":
            reasons += _known_faults(problem, kernel)
        return reasons + self._torch_objects(problem, kernel, empty, form, device)

    def forward(self, q, k, v, spec):
        """(o, None) by the kernel; rows that see no key are zeros around it."""
        kernel = self._kernel(DTYPE_NAMES[q.dtype], q.device)
        empty, form = plan(spec.band, q.shape[2], k.shape[2])
        q = q[:, :, empty:]
        if kernel != SDPBackend.MATH:
            q, k, v = dense(q), dense(k), dense(v)
        mask = None
        if form == "lower-right" and _native(kernel, q.device, q.shape[1], k.shape[1]):
            mask = causal_lower_right(q.shape[2], k.shape[2])
        elif form in ("lower-right", "mask"):
            mask = boolean_mask(spec.band, q, k)
        with _pinned(kernel):
            try:
                o = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=form == "square", scale=spec.scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )  # fmt: skip
            except RuntimeError as error:
                if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                    raise
                raise NotImplementedError(
                    f"backend {self.name!r}: torch will not run its kernel here: {error}"
                ) from error
        if kernel != SDPBackend.MATH and o.requires_grad:
            o.register_hook(packed if kernel in _CUDNN_MAY_RUN else dense)  # a sum's gradient arrives with stride 0
        return (F.pad(o, (0, 0, empty, 0)) if empty else o), None

    def _kernel(self, dtype: str, device: torch.device) -> SDPBackend | None:
        if self.kernel is None and dtype == "fp32" and device.type == "cuda":
            return SDPBackend.EFFICIENT_ATTENTION  # and no other maths where that cannot run
        return self.kernel

    def _torch_objects(self, problem, kernel, empty, form, device) -> list[str]:
        # Asks the dispatcher itself, with stand-ins of the right shape that own one row of memory.
        def stand_in(heads, seq):
            row = torch.empty(problem.head_dim, dtype=TORCH_DTYPES[problem.dtype], device=device)
            row.requires_grad_(problem.pass_ != "fwd")
            return row.expand(problem.batch, heads, seq, problem.head_dim)

        q, k = stand_in(problem.heads_q, problem.seq_q - empty), stand_in(problem.heads_kv, problem.seq_kv)
        mask = None
        if form == "mask":
            mask = torch.ones((), dtype=torch.bool, device=device).expand(q.shape[2], k.shape[2])
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard, torch.enable_grad(), warnings.catch_warnings(record=True) as heard, _pinned(kernel):
            warnings.simplefilter("always")
            try:
                torch._fused_sdp_choice(
                    q, k, k, mask, 0.0, form == "square", enable_gqa=problem.heads_q != problem.heads_kv
                )
            except RuntimeError as error:
                said = [str(warning.message).split(" (Triggered internally")[0] for warning in heard]
                return [f"torch: {text}" for text in _own_words(said, kernel)] or [f"torch: {error}"]
        return []


class SdpaFlash(Sdpa):
    """FlashAttention-2 inside torch; on the CPU torch's own flash kernel."""

    name = "sdpa-flash"
    kernel = SDPBackend.FLASH_ATTENTION
    on: ClassVar = {
        "cpu": CPU,
        "cuda": Capability(
            devices=("cuda",),
            precisions=HALF,
            features=FEATURES - {"window"},  # takes no mask
            min_arch=(8, 0),
            deterministic=False,  # the backward adds dq atomically
            kernels="pytorch_flash|flash_(fwd|bwd)",
        ),
    }


class SdpaCudnn(Sdpa):
    """cuDNN's fused attention."""

    name = "sdpa-cudnn"
    kernel = SDPBackend.CUDNN_ATTENTION
    on: ClassVar = {
        "cuda": Capability(
            devices=("cuda",),
            precisions=HALF,
            features=FEATURES,
            min_arch=(8, 0),
            head_dims=range(8, 257, 8),  # above 128 as cuDNN's version and the device allow: torch says
            deterministic=False,
            kernels="cudnn",
        )
    }

    def version(self):
        """torch's version and that of the cuDNN it loaded."""
        return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


class SdpaEfficient(Sdpa):
    """The memory-efficient kernel from xformers (CUTLASS); fp32 in three TF32 products."""

    name = "sdpa-efficient"
    kernel = SDPBackend.EFFICIENT_ATTENTION
    on: ClassVar = {
        "cuda": Capability(
            devices=("cuda",),
            precisions={"fp32": ("tf32x3",), **HALF},
            features=FEATURES,
            head_dims=range(4, 1 << 16, 4),  # fp16 and bf16: multiples of 8
            deterministic=False,
            kernels="fmha_cutlass|PyTorchMemEffAttention",
        )
    }


class SdpaMath(Sdpa):
    """The unfused composition of matmul and softmax; fp32 in the class torch's matmul is set to."""

    name = "sdpa-math"
    kernel = SDPBackend.MATH
    on: ClassVar = {
        "cpu": dataclasses.replace(CPU, kernels=None),
        "cuda": Capability(
            devices=("cuda",),
            precisions={"fp64": ("fp64",), "fp32": ("ieee", "tf32"), **HALF},
            features=FEATURES,
            head_dims=ANY_HEAD_DIM,
        ),
    }


_CUDNN_MAY_RUN = (None, SDPBackend.CUDNN_ATTENTION)


def _known_faults(problem: Problem, kernel: SDPBackend | None) -> list[str]:
    # What the kernels get wrong on CUDA and torch does not object to (torch 2.11, cuDNN 9.19).
    reasons = []
    by_row_maximum = kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) or (
        kernel is None and problem.dtype in HALF
    )
    if problem.scale is not None and problem.scale <= 0 and by_row_maximum:
        reasons.append("scale <= 0: the kernel scales the row maximum afterwards and returns NaN")
    pairs = problem.batch * problem.heads_q
    if pairs > GRID_LIMIT and kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        reasons.append(f"batch * heads {pairs}: the kernel puts them on a grid axis that holds {GRID_LIMIT}")
    rows = problem.batch * max(problem.heads_q * problem.seq_q, problem.heads_kv * problem.seq_kv)
    cudnn_may_run = kernel in _CUDNN_MAY_RUN and problem.dtype in HALF
    if cudnn_may_run and problem.pass_ != "fwd" and rows * problem.head_dim > INDEX_LIMIT:
        reasons.append(f"backward of {rows * problem.head_dim} elements: cuDNN's gradients past 2^31 are wrong")
    return reasons


def plan(band: Window, seq_q: int, seq_kv: int) -> tuple[int, str]:
    """How SDPA is told a bottom-right band: (leading rows that see no key, form of the rest).

    "full": every row sees every key. "square": causal with equal lengths, where both corners agree.
    "lower-right": causal with fewer queries than keys. "mask": anything else. Empty rows only occur
    at the top and leave the kernel, so that what it makes of a row without keys does not matter.
    """
    left, right = band
    empty = 0 if right is None else max(0, seq_q - seq_kv - right)
    offset = seq_kv - (seq_q - empty)
    right_open = right is None or offset + right >= seq_kv - 1  # the first row sees the last key
    left_open = left is None or left >= seq_kv - 1  # the last row sees the first key
    if left_open and right_open:
        return empty, "full"
    if left_open and right == 0:
        return empty, "square" if offset == 0 else "lower-right"
    return empty, "mask"


def boolean_mask(band: Window, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(seq_q, seq_kv), True where visible. Built anew in every call: a cached one could belong to the
    memory of a captured CUDA graph."""
    left, right = band
    offset = k.shape[2] - q.shape[2]
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    keep = keep if right is None else keep.tril_(offset + right)
    return keep if left is None else keep.triu_(offset - left)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x where the fused kernels read it right, else a dense copy (differentiable). They need a last stride
    of 1; those of CUDA load 16 bytes at a time and trip over stride 0 (pytorch#191937), and the efficient one's
    offsets of rows have 32 bits."""
    lanes = 16 // x.element_size()
    if not x.is_cuda or x.shape[-1] % lanes:  # on CUDA torch pads such heads into a copy of its own, or refuses them
        return x if x.stride(-1) == 1 else x.contiguous()
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    near = x.shape[2] * x.stride(2) <= INDEX_LIMIT
    if near and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step and step % lanes == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def packed(x: torch.Tensor) -> torch.Tensor:
    """dense(x), and contiguous: torch keeps cuDNN's backward plan by all shapes and strides but dO's, so that a dO
    in a second layout would be read through the first one's strides."""
    return dense(x.contiguous())


def _native(kernel: SDPBackend | None, device: torch.device, heads_q: int, heads_kv: int) -> bool:
    # Does a kernel without a mask tensor take causal_lower_right? torch routes it to flash, else to the
    # efficient kernel, whose direct entry knows no groups.
    if device.type != "cuda" or kernel in (SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION):
        return False
    return kernel == SDPBackend.FLASH_ATTENTION or heads_q == heads_kv


def _pinned(kernel: SDPBackend | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if kernel is None else sdpa_kernel([kernel])


def _own_words(said: list[str], kernel: SDPBackend | None) -> list[str]:
    # torch explains one kernel after another under headings; that the others are switched off is our pin.
    headings = {
        "Memory efficient kernel not used because": SDPBackend.EFFICIENT_ATTENTION,
        "Flash attention kernel not used because": SDPBackend.FLASH_ATTENTION,
        "cuDNN attention kernel not used because": SDPBackend.CUDNN_ATTENTION,
        "CuDNN attention kernel not used because": SDPBackend.CUDNN_ATTENTION,
    }
    words, about = [], None
    for text in said:
        if text.rstrip(": ") in headings:
            about = headings[text.rstrip(": ")]
        elif about in (None, kernel) and "runtime disabled" not in text:
            words.append(text)
    return words


def _union(capabilities: list[Capability]) -> Capability:
    # For listings: what the backend can do on one device or another.
    precisions: dict[str, tuple[str, ...]] = {}
    for capability in capabilities:
        for dtype, classes in capability.precisions.items():
            precisions[dtype] = tuple(dict.fromkeys((*precisions.get(dtype, ()), *classes)))
    return dataclasses.replace(
        capabilities[-1],
        devices=tuple(device for capability in capabilities for device in capability.devices),
        precisions=precisions,
        features=frozenset().union(*(capability.features for capability in capabilities)),
        head_dims=max((capability.head_dims for capability in capabilities), key=len),
        deterministic=all(capability.deterministic for capability in capabilities),
        kernels="|".join(capability.kernels for capability in capabilities if capability.kernels) or None,
    )
