"""Tensors of more than 2^31 elements, and rows further apart than 32 bits reach. On a GPU alone: they take its memory."""

from __future__ import annotations

import pytest
import torch
from judged import DTYPE_OF, Case

GIB = 1 << 30


def needs_memory(case: Case, gib: float) -> None:
    """Skip, in words, where it is not there."""
    if case.device.type != "cuda":
        pytest.skip("tensors of this size are for a GPU")
    if DTYPE_OF[case.precision] == "fp32" or case.precision != case.backend.classes("bf16", case.device)[:1][0]:
        pytest.skip("one 16-bit class is enough: offsets count elements")
    free, _ = torch.cuda.mem_get_info(case.device)
    free += torch.cuda.memory_reserved(case.device) - torch.cuda.memory_allocated(case.device)
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of device memory, {free / GIB:.0f} are free")


@pytest.fixture(autouse=True)
def give_back():
    """The next test wants the memory too."""
    yield
    torch.cuda.empty_cache()


def outputs(case: Case, problem, q, k, v, do) -> list[torch.Tensor]:
    """o and, where there is a backward, dq, dk, dv. Skips where the backend's own workspace does not fit."""
    try:
        if problem.pass_ == "fwd":
            return [case.attention(q, k, v, problem)]
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        o = case.attention(q, k, v, problem)
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]
    except torch.OutOfMemoryError as full:
        pytest.skip(f"{case.backend.name} needs more memory than the device has: {full}")


def test_more_than_2_31_elements(case: Case):
    """The last batch lies past element 2^31 and comes out as it does alone; so does the first."""
    needs_memory(case, 52)
    problem = case.problem(batch=4_104, heads_q=64, seq_q=64, head_dim=128, causal=True)
    shape = problem.batch, problem.heads_q, problem.seq_q, problem.head_dim
    q, k, v, do = (torch.empty(shape, dtype=case.dtype, device=case.device).normal_() for _ in range(4))
    assert q.numel() > 1 << 31
    whole = outputs(case, problem, q, k, v, do)
    for at in (slice(-1, None), slice(0, 1)):
        alone = outputs(case, problem.replace(batch=1), q[at].clone(), k[at].clone(), v[at].clone(), do[at].clone())
        for x, y in zip(whole, alone, strict=True):
            scale = float(y.abs().max())
            assert torch.allclose(x[at], y, rtol=0, atol=8 * case.roundoff * scale)


@pytest.mark.parametrize("wide", ["q", "k", "v", "do"])
def test_rows_far_apart(case: Case, wide):
    """One tensor's rows are 2^24 elements apart: a tile of them spans more than 2^31."""
    needs_memory(case, 16)
    problem = case.problem(heads_q=2, seq_q=300, head_dim=64, causal=True)
    if wide == "do" and problem.pass_ == "fwd":
        pytest.skip(f"{case.backend.name} has no backward on {case.device.type}")
    shape = problem.batch, problem.heads_q, problem.seq_q, problem.head_dim
    tensors = {n: torch.randn(shape, device=case.device).to(case.dtype) for n in ("q", "k", "v", "do")}
    dense = outputs(case, problem, **tensors)
    buffer = torch.empty(300 << 24, dtype=case.dtype, device=case.device)
    tensors[wide] = buffer.as_strided(shape, (0, 64, 1 << 24, 1)).copy_(tensors[wide])
    try:
        apart = outputs(case, problem, **tensors)
    except NotImplementedError as refusal:
        pytest.skip(f"refused: {refusal}")
    for x, y in zip(apart, dense, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=8 * case.roundoff * float(y.abs().max()))
