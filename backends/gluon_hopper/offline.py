"""Build a planned kernel for sm_90, with or without having one."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from flash2.backends.gluon_hopper import launch
from flash2.backends.gluon_hopper.configs import ForwardConfig
from flash2.core.contract import TORCH_DTYPES, spec_of
from flash2.core.problem import Problem

TARGET = GPUTarget("cuda", 90, 32)


def planned(problem: Problem, config: ForwardConfig | None = None) -> tuple[launch.Launch, tuple]:
    """(launch, tensors) of the forward for contiguous tensors that hold nothing."""
    dtype = TORCH_DTYPES[problem.dtype]
    with torch.device("meta"):
        q = launch.empty_rows(
            (problem.batch, problem.heads_q, problem.seq_q, problem.head_dim), torch.empty(0, dtype=dtype)
        )
        k = launch.empty_rows((problem.batch, problem.heads_kv, problem.seq_kv, problem.head_dim), q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
    plan = launch.plan_forward(q, k, k, spec_of(problem), config)
    return plan.launch, (q, k, k, q, lse, lse if plan.table is None else plan.table)


def build(planned_launch: launch.Launch, tensors: tuple) -> CompiledKernel:
    """Compile one launch as Triton's own dispatch would, so that a later launch finds it in Triton's cache.

    Raises what the compiler raises, for instance when a configuration asks for more than it can do.
    """
    kernel = planned_launch.kernel
    backend = make_backend(TARGET)
    arguments, options = planned_launch.arguments(tensors)
    options = {**options, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, **options
    )
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = GluonASTSource if kernel.is_gluon() else ASTSource  # what comes before and after is plain Triton
    return compile(source(kernel, signature, constants, attributes), TARGET, options.__dict__)
