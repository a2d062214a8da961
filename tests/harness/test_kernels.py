"""Whose kernels ran: what autograd records of a backend's own call is no stranger's work, a borrowed backward is."""

import pytest
import torch

pytest.importorskip("numba")

import flash2
from flash2.backends.numba_cpu import NumbaCPU
from flash2.core.cell import Operation, fallback, kernel_names
from flash2.core.inputs import make_inputs
from flash2.core.problem import Problem

CPU = torch.device("cpu")
PROBLEM = Problem(heads_q=2, seq_q=64, head_dim=32, causal=True)


class BorrowsItsBackward(NumbaCPU):
    """Its own kernel forward; torch's flash attention does the work of the backward."""

    def backward(self, do, q, k, v, o, lse, spec):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=spec.causal, scale=spec.scale)
        return torch.autograd.grad(o, (q, k, v), do)


def names(backend, pass_):
    problem = PROBLEM.replace(pass_=pass_)
    return kernel_names(Operation(backend, problem, make_inputs(problem)), CPU)


@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("name", ["numba", "sdpa-flash"])
def test_a_backends_own_work_is_no_fallback(name, pass_):
    backend = flash2.get_backend(name)
    found = names(backend, pass_)
    assert backend.capability.kernels and found
    assert fallback(backend, found, CPU) is None, found


@pytest.mark.parametrize("pass_", ["bwd", "fwd+bwd"])
def test_a_borrowed_backward_is_a_fallback(pass_):
    reason = fallback(BorrowsItsBackward(), names(BorrowsItsBackward(), pass_), CPU)
    assert reason is not None and "scaled_dot_product" in reason
    assert fallback(BorrowsItsBackward(), names(BorrowsItsBackward(), "fwd"), CPU) is None
