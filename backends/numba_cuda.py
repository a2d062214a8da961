"""FlashAttention-2 written in numba's CUDA Python: IEEE float32, forward and backward; small, and not made for speed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings

import numpy as np
import torch

from flash2.core.contract import FEATURES, Backend, Capability, Spec

# Set before numba is imported, this runs the kernels on the CPU, for tests: very slow, and exact in their semantics.
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
OPEN = 1 << 40  # an open end of the band: beyond any length, and far from where 64 bits end


class NumbaCuda(Backend):
    """One kernel forward; row statistics and one kernel per side backward, without atomics: bitwise reproducible."""

    name = "numba-cuda"
    settled = True
    opaque = True
    capability = Capability(
        devices=("cuda", "cpu") if SIMULATED else ("cuda",),
        precisions={"fp32": ("ieee",)},
        features=frozenset(FEATURES),
        min_arch=(7, 5),
        head_dims=range(1, 257),
        kernels=r"numba_cuda_kernels",  # the module's name is part of theirs
    )

    def unavailable(self):
        """numba-cuda missing, or no GPU to run it on (and no simulator asked for)."""
        return _lacking()

    def version(self):
        """numba-cuda's version, or numba's, whose simulator runs without it."""
        package = "numba-cuda" if importlib.util.find_spec("numba_cuda") else "numba"
        return f"{package} {importlib.metadata.version(package)}"

    def scratch_bytes(self, problem):
        """The backward's row statistics."""
        return 0 if problem.pass_ == "fwd" else 4 * problem.batch * problem.heads_q * problem.seq_q

    def forward(self, q, k, v, spec):
        """(o, lse), both contiguous; the first call of each multiple of 16 in head_dim compiles for seconds."""
        call = Call(q, k, spec)
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=q.dtype, device=q.device)
        slopes, slope_strides = call.slopes
        call.launch(
            "forward", call.tiles(q), flat(q), flat(k), flat(v), flat(o), flat(lse), slopes,
            q.stride(), k.stride(), v.stride(), slope_strides, *call.scalars,
        )  # fmt: skip
        return o, lse

    def backward(self, do, q, k, v, o, lse, spec):
        """(dq, dk, dv), contiguous."""
        call = Call(q, k, spec)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty(q.shape[:3], dtype=q.dtype, device=q.device)
        lse = lse.contiguous()
        slopes, slope_strides = call.slopes
        call.launch(
            "statistics", call.rows(q), flat(do), flat(o), flat(delta), do.stride(), o.stride(), call.scalars[0]
        )
        for kernel, blocks, outputs in (
            ("gradients_kv", call.tiles(k), (flat(dk), flat(dv))),
            ("gradients_q", call.tiles(q), (flat(dq),)),
        ):
            call.launch(
                kernel, blocks, flat(do), flat(q), flat(k), flat(v), flat(lse), flat(delta), *outputs, slopes,
                do.stride(), q.stride(), k.stride(), v.stride(), slope_strides, *call.scalars,
            )  # fmt: skip
        return dq, dk, dv


class Call:
    """What the kernels of one call share: their scalars, sizes of grids, and the way to launch them."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, spec: Spec) -> None:
        from flash2.backends import numba_cuda_kernels

        self.module = numba_cuda_kernels
        self.kernels = numba_cuda_kernels.kernels(-(-q.shape[3] // numba_cuda_kernels.SIDE))
        alibi = spec.alibi_slopes
        slopes = q[:, :, 0, 0] if alibi is None else alibi.expand(q.shape[:2])  # without ALiBi nobody looks at them
        self.slopes = flat(slopes), slopes.stride()
        band = tuple(OPEN if end is None else min(end, OPEN) for end in spec.band)
        sizes = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], int(alibi is not None))
        self.scalars = sizes, band, np.float32(spec.scale), np.float32(spec.softcap)
        self.device = q.device

    def tiles(self, x: torch.Tensor) -> int:
        """Tiles of x: the blocks of a kernel that owns them."""
        return x.shape[0] * x.shape[1] * -(-x.shape[2] // self.module.TILE)

    def rows(self, x: torch.Tensor) -> int:
        """Blocks of a kernel with a thread for each row of x."""
        return x.shape[0] * x.shape[1] * -(-x.shape[2] // self.module.SIDE**2)

    def launch(self, name: str, blocks: int, *arguments) -> None:
        """Queue a kernel on torch's current stream."""
        kernel, threads = getattr(self.kernels, name), (self.module.SIDE, self.module.SIDE)
        if SIMULATED:
            kernel[blocks, threads](*arguments)
        else:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            _configured(kernel, blocks, threads, self.device.index, stream)(*arguments)


@functools.lru_cache(maxsize=256)
def _configured(kernel, blocks: int, threads: tuple[int, int], device: int, stream: int):
    # kernel[grid, block, stream] while `device` is current; making one anew costs the host more than the launch.
    from numba import cuda

    with warnings.catch_warnings():  # numba has an opinion on small grids
        warnings.filterwarnings("ignore", message="Grid size")
        return kernel[blocks, threads, cuda.external_stream(stream)]


def flat(x: torch.Tensor):
    """Everything from the first to the last element of x as a one-dimensional array of numba's on the same memory.

    Strides go to the kernels as numbers: one compiled kernel for any of them.
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    line = x.detach().as_strided((span,), (1,))
    if SIMULATED:
        return line.numpy()
    from numba import cuda

    return cuda.as_cuda_array(line, sync=False)


@torch.compiler.assume_constant_result  # nothing here that a compiler could trace
@functools.cache
def _lacking() -> str | None:
    package = "numba" if SIMULATED else "numba_cuda"  # which numba.cuda comes from: docs/design.md
    if importlib.util.find_spec(package) is None:
        return f"{package.replace('_', '-')} is not installed; pip install 'flash2-triton[numba-cuda]'"
    if SIMULATED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device; NUMBA_ENABLE_CUDASIM=1 runs the kernels on the CPU, very slowly, for tests"
    remedy = "pip install -U 'flash2-triton[numba-cuda]'"
    try:
        from numba import cuda

        importlib.import_module("numba.cuda.np.arrayobj")  # as the first launch does: it names what this NumPy may lack
    except Exception as error:  # whatever an installation that does not fit, or another module of that name, comes to
        return f"numba-cuda does not load beside NumPy {np.__version__} ({type(error).__name__}: {error}); {remedy}"
    return None if cuda.is_available() else f"numba-cuda finds no CUDA driver or no NVVM; {remedy}"
