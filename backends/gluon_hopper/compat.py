"""Gluon as Triton 3.6 to 3.9 spell it: the one file that knows their differences. Kernels take their names from here.

Names that changed: gl.thread_barrier became gl.barrier (3.7), tma.async_copy_* became tma.async_load and async_store
(3.8), the reducing store got a name at last (tma.async_atomic_add, 3.8; before, only the compiler had it), and shared
memory's _reinterpret became reinterpret (3.9). Meaning that changed: names that a tuple of constants is unpacked into
are constants themselves from 3.8 on only if they are annotated before.
"""

import re
import types

import triton
from triton.experimental import gluon as _gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "FIRST_BARRIER",
    "HASTY",
    "ROOMY",
    "WHOLE",
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "group_barrier",
    "mbarrier",
    "reinterpret",
    "tma_load",
    "tma_reduce_add",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

# Of the 16 named barriers of a block Triton takes 0 for the default partition, 1 to hand work to the others, and
# one for each of up to three worker partitions.
FIRST_BARRIER = gl.constexpr(5)

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Does the ptxas of this Triton, that of 3.6, find registers for Q beside a large O? Later ones spill.
ROOMY = _VERSION == (3, 6)

# Does it find registers for additions in halves (backward.add_half)? Those of 3.7 and 3.8 spill.
WHOLE = gl.constexpr(_VERSION in ((3, 7), (3, 8)))

# Does it reckon numbers of the next step beside this one's, where a mask (backward.fused_step) or grouped heads have left no
# register? That of 3.9 spills for it.
HASTY = gl.constexpr(_VERSION >= (3, 9))

_UNPACKED = re.compile(r"^( +)((?:\w+, )+\w+) = ([A-Z]+)(?=\s*(?:#.*)?$)", re.MULTILINE)


def _jit(function=None, **options):
    """gluon.jit, under which `A, B = UPPER_CASE` unpacks a tuple of constants into constants in every version."""
    if function is None:
        return lambda function: _jit(function, **options)
    kernel = _gluon.jit(function, **options)

    def annotated(match):
        indent, names, values = match.groups()
        return f"{indent}{''.join(f'{name}: gl.constexpr; ' for name in names.split(', '))}{names} = {values}"

    kernel._unsafe_update_src(_UNPACKED.sub(annotated, kernel.src))
    return kernel


_names_stay_constants = _VERSION < (3, 8)
gluon = (
    _gluon if _names_stay_constants else types.SimpleNamespace(jit=_jit, constexpr_function=_gluon.constexpr_function)
)

# All threads of the calling partition.
group_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# (descriptor, coordinates, mbarrier, shared memory), (descriptor, coordinates, shared memory), (how many may be pending)
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):
    """The bytes of `tile` as another dtype, shape and layout."""
    method = getattr(tile, "reinterpret", None) or tile._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


if hasattr(tma, "async_atomic_add"):
    tma_reduce_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @builtin
    def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
        """Add a tile of shared memory to global memory, element by element, asynchronously like tma_store."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)
