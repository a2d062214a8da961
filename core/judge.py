"""Is an output right? Its error against the float64 oracle, held against what honest arithmetic loses.

For each of o, dq, dk, dv, with e the candidate's error and e_emul that of the tight emulation (core/reference.py):

    T1  every element        |e| <= a * max|e_emul| + eps * |reference|, eps one rounding of the class
    T2  the whole tensor     rms(e) <= b * rms(e_emul)
    T3  every row            rms(e_row) / size_row <= c * the largest such ratio of the emulation

lse has T1 alone, with room for what its rounding can do to P. The sizes are the oracle's (reference.oracle): what the
row would be without cancelling. The emulation's figures count as at least `floor` roundings of that size, so that a
tiny problem in which it happens to be exact raises no alarm. Why, and how the constants were found: docs/numerics.md.

Largest (a, b, c) that independent honest kernels needed on the calibration grid of tests/calibrate.py, seq >= 64:

    device  kernels                          class       forward             backward
    CPU     sdpa-flash, sdpa-math            fp16, bf16  0.84  1.03  1.11    4.10  2.49  2.93
    CPU     sdpa-flash, sdpa-math, numba     ieee        2.11  1.00  2.34    2.12  1.25  2.31
    H200    sdpa-flash, -cudnn, -efficient,  fp16, bf16  0.86  1.00  1.33    1.82  1.43  2.17
            -math
    H200    naive, sdpa-math                 ieee        4.73  2.43  6.62    7.39  3.70  4.49
    H200    naive, sdpa-math                 tf32        0.39  0.38  0.78    0.42  0.39  1.16
    H200    sdpa-efficient                   tf32x3      1.07  0.77  1.30    2.11  0.85  1.20

The ieee kernels of the H200 need that much at seq 4096 alone, and 2.00, 1.00, 1.52 at most below. Under 64 rows luck
decides: forward 2.45, 2.46, 2.59 and backward 2.25, 1.79, 3.77 at most for ieee (numba on the CPU).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from flash2.core.contract import TORCH_DTYPES
from flash2.core.inputs import Inputs
from flash2.core.problem import PRECISIONS, Problem
from flash2.core.reference import FP64_PER_FP32, Tensors, emulate, oracle

FORWARD, BACKWARD = ("o", "lse"), ("dq", "dk", "dv")
# What the oracle may cost: a problem above it is judged on a random choice of whole heads.
FLOP_BUDGET = {"cuda": 4e12, "cpu": 1.5e10}
_FLOPS_PER_EXP = 128  # what a score costs beyond its matmuls, in matmul FLOPs of equal time, roughly
_LEAST_SIZE = 2.0**-12  # rows below this share of the rms size count as this large: their P underflows in the dtype
_SAMPLE_ELEMENTS = 1 << 26  # float64 elements of all reference tensors together


@dataclass(frozen=True, slots=True)
class Budget:
    """The constants of rule T for one class and pass; eps and floor count roundings of the class, the one relative
    to the element and the other to its row's size."""

    a: float
    b: float
    c: float
    eps: float
    floor: float


@dataclass(frozen=True, slots=True)
class Rounding:
    """Unit roundoffs of a class: of stored P, dS and outputs, and of a logit (relative to its magnitude)."""

    stored: float
    logit: float


ROUNDING = {
    "fp64": Rounding(2.0**-53, 2.0**-53),
    "ieee": Rounding(2.0**-24, 2.0**-24),
    "bf16x6": Rounding(2.0**-24, 2.0**-24),
    "tf32x3": Rounding(2.0**-23, 2.0**-23),
    "bf16x3": Rounding(2.0**-17, 2.0**-17),
    "tf32": Rounding(2.0**-10, 2.0**-10),
    "fp16": Rounding(2.0**-11, 2.0**-24),
    "bf16": Rounding(2.0**-8, 2.0**-24),
}
# (forward, backward); where they come from: the table in the module's docstring.
_LOW = Budget(a=2, b=1.25, c=1.5, eps=1, floor=0.25), Budget(a=6, b=3.5, c=4, eps=1, floor=0.25)
# T3 of the fp32 classes is wide: a row is as exact as its logits, and an FFMA product over head_dim that sums in
# sequence loses several times what the emulation's does, which sums in parts.
_WIDE = Budget(a=8, b=3, c=20, eps=1, floor=1), Budget(a=8, b=4, c=10, eps=1, floor=1)
BUDGETS = {name: _LOW if name in ("fp16", "bf16", "tf32") else _WIDE for name in ROUNDING}


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """The error of one output tensor, over the judged heads.

    max, rms: absolute. relative: rms over that of the row sizes. worst_row: the largest rms of a row's error over the
    row's size. used: the shares of the budgets of (T1, T2, T3) that were used up, above 1 being wrong; lse has T1
    only. emulated: (max, rms, worst_row) of the emulation, floors included. where: index of the worst element.
    """

    max: float
    rms: float
    relative: float
    worst_row: float
    used: tuple[float, float, float]
    emulated: tuple[float, float, float]
    where: tuple[int, ...]
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says. `error` has the max, rms and worst_row (see ErrorReport) of the worst tensor, the one
    that used the largest share of its budget among o (a forward) or dq, dk, dv (a backward); lse counts for neither."""

    ok: bool
    reason: str
    error: dict[str, float | None]
    per_tensor: dict[str, ErrorReport]


class Judge:
    """Judges any number of outputs for one problem and its inputs; the oracle runs once, each emulation once.

    Heads beyond a FLOP budget (`flops`, by default FLOP_BUDGET of the device) are sampled: whole groups of query
    heads with their key/value head, chosen by `seed`, always the first and the last, with all their rows and keys.
    The rest of an output is still checked for NaN and Inf and for rows that must be empty.
    """

    def __init__(self, problem: Problem, inputs: Inputs, *, flops: float | None = None, seed: int = 0):
        self.problem, self.inputs = problem, inputs
        self._flops = FLOP_BUDGET["cuda" if inputs.q.is_cuda else "cpu"] if flops is None else flops
        self._seed = seed
        self._sample: tuple[torch.Tensor, torch.Tensor] | None = None
        self._oracle: Tensors = {}
        self._emulated: dict[str, Tensors] = {}
        self._finite: bool | None = None

    def check(self, outputs: dict[str, torch.Tensor], precision: str) -> Verdict:
        """The verdict on `outputs`, any of o, lse, dq, dk, dv, as arithmetic of class `precision`.

        Raises ValueError for a class the problem's dtype does not have or an unknown output.
        """
        if precision not in PRECISIONS[self.problem.dtype]:
            allowed = ", ".join(PRECISIONS[self.problem.dtype])
            raise ValueError(f"precision {precision!r} is no class of {self.problem.dtype}; it has: {allowed}")
        if unknown := sorted(set(outputs) - {*FORWARD, *BACKWARD}):
            raise ValueError(f"unknown output {unknown[0]!r}; known: {', '.join(FORWARD + BACKWARD)}")
        for name, x in outputs.items():
            if wrong := self._malformed(name, x):
                return Verdict(False, f"{name} {wrong}", _no_error(), {})
        with torch.no_grad():
            self._prepare(precision, backward=any(name in outputs for name in BACKWARD))
            reports = {name: self._report(name, x.detach(), precision) for name, x in outputs.items()}
        wrong = [f"{name} {report.wrong}" for name, report in reports.items() if report.wrong]
        shown = {name: report for name, report in reports.items() if name != "lse"} or reports
        if not shown:
            return Verdict(False, "no output to judge", _no_error(), {})
        name, worst = max(shown.items(), key=lambda item: max(item[1].used))
        share = max(worst.used)
        reason = "; ".join(wrong) or f"{name} used {share:.0%} of its budget (T{worst.used.index(share) + 1})"
        error = {key: _number(getattr(worst, key)) for key in ("max", "rms", "worst_row")}
        return Verdict(not wrong, reason, error, reports)

    def _malformed(self, name: str, x: object) -> str:
        p = self.problem
        if type(x) is not torch.Tensor:
            return f"is a {type(x).__name__}, not a plain torch.Tensor"
        heads, seq = (p.heads_kv, p.seq_kv) if name in ("dk", "dv") else (p.heads_q, p.seq_q)
        shape = (p.batch, heads, seq) if name == "lse" else (p.batch, heads, seq, p.head_dim)
        dtype = TORCH_DTYPES[p.dtype]
        dtype = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        if tuple(x.shape) != shape:
            return f"has shape {tuple(x.shape)}, not {shape}"
        if x.dtype != dtype:
            return f"is {x.dtype}, not {dtype}"
        if x.device != self.inputs.q.device:
            return f"is on {x.device}, not {self.inputs.q.device}"
        for other in ("q", "k", "v", "do"):
            mine, theirs = x.untyped_storage(), getattr(self.inputs, other).untyped_storage()
            if mine.nbytes() and mine.data_ptr() == theirs.data_ptr():
                return f"lies in the memory of the input {other}"
        return ""

    # ---- the oracle, the emulation and the heads they are computed for

    def _groups(self, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads_kv) indices of the judged groups, ascending."""
        p = self.problem
        total, group = p.batch * p.heads_kv, p.heads_q // p.heads_kv
        cost = group * p.seq_q * p.seq_kv * ((10 if backward else 4) * p.head_dim + _FLOPS_PER_EXP)
        elements = (2 * group * p.seq_q + 2 * p.seq_kv) * p.head_dim
        many = int(max(2, min(self._flops // max(cost, 1), _SAMPLE_ELEMENTS // max(elements, 1))))
        if many >= total:
            chosen = list(range(total))
        else:
            inner = random.Random(self._seed).sample(range(1, total - 1), many - 2)
            chosen = sorted([0, *inner, total - 1])
        chosen = torch.tensor(chosen, dtype=torch.long, device=self.inputs.q.device)
        return chosen // p.heads_kv, chosen % p.heads_kv

    def _sampled(self, x: torch.Tensor) -> torch.Tensor:
        """The judged heads of a (batch, heads, ...) tensor as (groups, heads of a group, ...)."""
        assert self._sample is not None  # _prepare comes first
        return x.unflatten(1, (self.problem.heads_kv, -1))[self._sample]

    def _prepare(self, precision: str, backward: bool) -> None:
        """Compute what is missing of the oracle and of the emulation; a backward may choose fewer heads."""
        if "o" not in self._oracle or (backward and "dq" not in self._oracle):
            self._sample = self._groups(backward)
            self._emulated.clear()
            self._oracle = oracle(*self._operands(backward), **self._options())
        if precision not in self._emulated:
            out = emulate(*self._operands("dq" in self._oracle), precision=precision, **self._options())
            self._emulated[precision] = out

    def _operands(self, backward: bool) -> list[torch.Tensor]:
        names = ("q", "k", "v", "do") if backward else ("q", "k", "v")
        return [self._sampled(getattr(self.inputs, name)) for name in names]

    def _options(self) -> dict:
        p, slopes = self.problem, self.inputs.alibi_slopes
        if slopes is not None:
            slopes = self._sampled(slopes.expand(p.batch, p.heads_q))
        return {"causal": p.causal, "window": p.window, "softcap": p.softcap, "scale": p.scale, "alibi_slopes": slopes}

    # ---- the rule

    def _report(self, name: str, x: torch.Tensor, precision: str) -> ErrorReport:
        ref = self._oracle[name]
        got = self._sampled(x).double()
        representable = ref.to(x.dtype).isfinite()
        if name == "lse":
            return self._report_lse(got, ref, precision, self._strays(name, x, got, ref))
        size = self._oracle[f"size_{name}"].nan_to_num(nan=1.0)
        shrink = FP64_PER_FP32 if precision == "fp64" else 1.0
        error = (got - ref).masked_fill(~representable, 0)
        emulation = (self._emulated[precision][name].double() - ref).masked_fill(~representable, 0) * shrink
        budget, rounding = BUDGETS[precision][name in BACKWARD], ROUNDING[precision]

        logit = _amax(self._oracle["size_lse"].nan_to_num())
        # How a large logit happens to round is luck: the emulation's single draw may be exact, another kernel's not.
        floor = budget.floor * rounding.stored + rounding.logit * logit
        top, rms, rows = _figures(emulation, size)
        top, rms = max(top, 4 * floor * _amax(size)), max(rms, floor * _rms(size))
        worst_row = max(_amax(rows), floor)
        e_top, e_rms, e_rows = _figures(error, size)
        e_row = _amax(e_rows)

        allowed = budget.a * top + budget.eps * rounding.stored * ref.abs()
        over = error.abs() / allowed.clamp(min=math.ulp(0.0))
        used = (_amax(over), e_rms / max(budget.b * rms, math.ulp(0.0)), e_row / (budget.c * worst_row))
        wrong = self._strays(name, x, got, ref)
        where: tuple[int, ...] = ()
        if error.numel():
            where = self._index(name, over if used[0] >= min(used[2], 1) else e_rows)
        if not wrong and used[0] > 1:
            wrong = f"breaks T1 at {where}: off by {_value(error, over):.3g} where the reference is {_value(ref, over):.3g}, "
            wrong += f"{used[0]:.3g}x the {_value(allowed, over):.3g} that {precision} arithmetic explains"
        elif not wrong and used[2] > 1:
            wrong = f"breaks T3 at row {where}: relative error {e_row:.3g}, {used[2]:.3g}x the "
            wrong += f"{budget.c * worst_row:.3g} that {precision} arithmetic explains"
        elif not wrong and used[1] > 1:
            wrong = f"breaks T2: rms error {e_rms:.3g}, {used[1]:.3g}x the {budget.b * rms:.3g} that {precision} "
            wrong += "arithmetic explains"
        relative = e_rms / max(_rms(size), math.ulp(0.0))
        return ErrorReport(e_top, e_rms, relative, e_row, used, (top, rms, worst_row), where, wrong)

    def _report_lse(self, got, ref, precision: str, wrong: str) -> ErrorReport:
        budget, rounding = BUDGETS[precision][0], ROUNDING[precision]
        shrink = FP64_PER_FP32 if precision == "fp64" else 1.0
        fine = ref.isfinite()
        error = torch.where(fine, got - ref, 0)
        emulation = torch.where(fine, self._emulated[precision]["lse"].double() - ref, 0) * shrink
        top = _amax(emulation.abs())
        size = self._oracle["size_lse"].nan_to_num(nan=1.0)
        # An error of lse multiplies P: an eighth of the rounding of P itself changes nothing that can be seen.
        allowed = budget.a * (top + 2 * rounding.logit * size) + rounding.stored / 8
        over = error.abs() / allowed
        share = _amax(over)
        where = self._index("lse", over) if over.numel() else ()
        if not wrong and share > 1:
            wrong = f"breaks T1 at {where}: off by {_value(error, over):.3g} where the reference is "
            wrong += f"{_value(ref, over):.3g}, {share:.3g}x the {_value(allowed, over):.3g} allowed"
        relative = _rms(error) / max(_rms(size), math.ulp(0.0))
        figures = (_amax(error.abs()), _rms(error), relative, _amax(error.abs() / size))
        return ErrorReport(*figures, (share, 0.0, 0.0), (top, _rms(emulation), 0.0), where, wrong)

    def _strays(self, name: str, x: torch.Tensor, got: torch.Tensor, ref: torch.Tensor) -> str:
        """What is wrong with x without any arithmetic: NaN, Inf, empty rows that are not; over all heads."""
        if not x.numel():
            return ""
        low = ref.to(x.dtype)
        stray = low.isfinite() & ~got.isfinite()
        if bool(stray.any()):
            return f"is {_value(got, stray)} at {self._index(name, stray)}, the reference {_value(ref, stray):.3g}"
        missing = ref.isnan() & ~got.isnan()
        if bool(missing.any()):
            return f"is {_value(got, missing):.3g} at {self._index(name, missing)}, where a NaN is visible"
        empty = self._oracle["lse"][0, 0] == -torch.inf  # (seq_q,): every head has the same mask
        if name == "lse":
            exact = (x == -torch.inf) | ~empty
            if not bool(exact.all()):
                return f"is not -inf at {_first(~exact)}, a row that sees no key"
        elif name in ("o", "dq"):
            exact = (x == 0) | ~empty[:, None]
            if not bool(exact.all()):
                return f"is not 0 at {_first(~exact)}, a row that sees no key"
        if self._finite is None:
            i = self.inputs
            self._finite = all(bool(y.isfinite().all()) for y in (i.q, i.k, i.v, i.do))
        if self._finite and bool((low.isfinite() | (low == -torch.inf)).all()):
            stray = ~x.isfinite()
            if name == "lse":
                stray &= ~empty
            if bool(stray.any()):
                return f"is {_value(x, stray)} at {_first(stray)}, outside the heads compared with the reference"
        return ""

    def _index(self, name: str, share: torch.Tensor) -> tuple[int, ...]:
        """Index in the whole tensor of the largest element of a tensor over the judged heads."""
        assert self._sample is not None
        n, head, *rest = _first(share == share.amax() if share.dtype != torch.bool else share)
        batch, head_kv = (int(index[n]) for index in self._sample)
        group = share.shape[1]
        return (batch, head_kv * group + head, *rest)


def _figures(error: torch.Tensor, size: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """max, rms, and (groups, heads, seq) the rms of each row over its size; a row of size 0 must be exact."""
    rows = error.square().mean(-1).sqrt()
    least = size.clamp(min=_LEAST_SIZE * _rms(size)).masked_fill(size == 0, 0)
    rows = torch.where(rows == 0, 0.0, rows / least)
    return _amax(error.abs()), _rms(error), rows


def _amax(x: torch.Tensor) -> float:
    return float(x.amax()) if x.numel() else 0.0


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _first(flags: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flags.flatten().to(torch.uint8).argmax(), flags.shape))


def _value(x: torch.Tensor, share: torch.Tensor) -> float:
    return float(x.flatten()[share.flatten().to(torch.float64).argmax()])


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None  # NaN and Inf are not JSON


def _no_error() -> dict[str, float | None]:
    return {"max": None, "rms": None, "worst_row": None}
