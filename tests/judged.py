"""How the contract's tests call a backend and have what it returns judged."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from flash2.core.contract import TORCH_DTYPES, Backend
from flash2.core.functional import attention
from flash2.core.inputs import Inputs, make_inputs
from flash2.core.judge import ROUNDING, Judge
from flash2.core.problem import PRECISIONS, Problem

DTYPE_OF = {precision: dtype for dtype, classes in PRECISIONS.items() for precision in classes}


@dataclass(frozen=True)
class Case:
    """A backend in one class of maths on one device."""

    backend: Backend
    precision: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The tensors' dtype."""
        return TORCH_DTYPES[DTYPE_OF[self.precision]]

    @property
    def roundoff(self) -> float:
        """Unit roundoff of a stored result."""
        return ROUNDING[self.precision].stored

    def has(self, feature: str) -> bool:
        """Whether the backend declares `feature` here."""
        return feature in self.backend.capability_on(self.device).features

    def problem(self, **fields: Any) -> Problem:
        """The problem with both passes, or the forward alone where there is no backward; skips, in the backend's
        words, what it does not support."""
        backward = self.backend.capability_on(self.device).backward
        fields = {"pass_": "fwd+bwd" if backward else "fwd", **fields}
        problem = Problem(dtype=DTYPE_OF[self.precision], precision=self.precision, **fields)
        if reasons := self.backend.why_not(problem, self.device):
            pytest.skip(f"{self.backend.name} does not support {problem.key()}: {'; '.join(reasons)}")
        return problem

    def run(self, problem: Problem, inputs: Inputs) -> dict[str, torch.Tensor]:
        """o, and lse and the gradients where the backend has them."""
        q, k, v = (x.detach().requires_grad_(problem.pass_ != "fwd") for x in (inputs.q, inputs.k, inputs.v))
        out = self.attention(q, k, v, problem, slopes=inputs.alibi_slopes, return_lse=self.has("lse"))
        names = ("o", "lse") if self.has("lse") else ("o",)
        outputs = dict(zip(names, out if self.has("lse") else (out,), strict=True))
        if problem.pass_ != "fwd":
            gradients = torch.autograd.grad(outputs["o"], (q, k, v), inputs.do)
            outputs |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        return {name: x.detach() for name, x in outputs.items()}

    def attention(self, q, k, v, problem: Problem, *, slopes=None, return_lse=False):
        """attention() as `problem` asks for it."""
        return attention(
            q, k, v, causal=problem.causal, window=problem.window, softcap=problem.softcap, scale=problem.scale,
            alibi_slopes=slopes, precision=self.precision, backend=self.backend, return_lse=return_lse,
        )  # fmt: skip

    def judge(self, problem: Problem, **how: Any) -> dict[str, torch.Tensor]:
        """Run `problem` on make_inputs(**how), assert that the judge accepts everything, and return the outputs."""
        inputs, judge = judged(problem.replace(precision=None, pass_="fwd+bwd"), str(self.device), **how)
        outputs = self.run(problem, inputs)
        verdict = judge.check(outputs, self.precision)
        assert verdict.ok, f"{problem.key()} {how}: {verdict.reason}"
        return outputs


@functools.lru_cache(maxsize=256)
def judged(problem: Problem, device: str, **how: Any) -> tuple[Inputs, Judge]:
    """The inputs and their judge, shared by all backends and classes."""
    inputs = make_inputs(problem, device=device, **how)
    return inputs, Judge(problem, inputs, flops=1e18)
