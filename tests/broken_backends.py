"""Backends that each break one line of the contract; tests/contract/test_suite.py shows that the suite notices."""

from __future__ import annotations

import dataclasses

import torch

from flash2.backends.naive import Naive


class _Broken(Naive):
    """Naive in fp32 and bf16 alone, so that a run of the whole suite stays short."""

    capability = dataclasses.replace(Naive.capability, precisions={"fp32": ("ieee",), "bf16": ("bf16",)})


def read_densely(x):
    """x as a kernel sees it that knows its shape and address but not its strides."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) if room >= x.numel() else x


class TopLeftCausal(_Broken):
    """SDPA's alignment: row i sees keys <= i, also when the lengths differ."""

    name = "top-left-causal"

    def forward(self, q, k, v, spec):
        if spec.causal and q.shape[2] < k.shape[2]:
            spec = dataclasses.replace(spec, causal=False, window=(None, 0))
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        return super().forward(q, k, v, spec)


class EmptyRowsAreNaN(_Broken):
    """A softmax over nothing, 0/0."""

    name = "empty-rows-are-nan"

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return o.masked_fill((lse == -torch.inf)[..., None], torch.nan), lse


class FiniteMinusInfinity(_Broken):
    """lse of an empty row from a finite stand-in for -inf."""

    name = "finite-minus-infinity"

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return o, lse.clamp(min=-1e6)


class LeaksHiddenNaN(_Broken):
    """0 * nan inside a tile."""

    name = "leaks-hidden-nan"

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return o + 0 * v.sum((1, 2, 3))[:, None, None, None], lse


class SwallowsNaN(_Broken):
    """fmax ignores a NaN."""

    name = "swallows-nan"

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return o.nan_to_num(), lse


class LseInLog2(_Broken):
    """The kernel works in base 2 and hands out what it has."""

    name = "lse-in-log2"

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return o, lse / 0.6931471805599453

    def backward(self, do, q, k, v, o, lse, spec):
        return super().backward(do, q, k, v, o, lse * 0.6931471805599453, spec)


class ForgetsTheGroup(_Broken):
    """dk and dv of the first query head of each group only."""

    name = "forgets-the-group"

    def backward(self, do, q, k, v, o, lse, spec):
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = super().backward(do, q, k, v, o, lse, spec)
        return dq, dk / group, dv / group


class ReadsDense(_Broken):
    """Takes q to be contiguous whatever its strides."""

    name = "reads-dense"

    def forward(self, q, k, v, spec):
        return super().forward(read_densely(q), k, v, spec)


class ReadsDenseUpstream(_Broken):
    """Takes dO to be contiguous whatever its strides."""

    name = "reads-dense-upstream"

    def backward(self, do, q, k, v, o, lse, spec):
        do = read_densely(do)
        return super().backward(do, q, k, v, o, lse, spec)


class WritesItsInput(_Broken):
    """Scales q in place, and back."""

    name = "writes-its-input"

    def forward(self, q, k, v, spec):
        with torch.no_grad():
            q.mul_(2).div_(2)
        return super().forward(q, k, v, spec)


class ReusesItsOutput(_Broken):
    """Keeps one buffer per shape."""

    name = "reuses-its-output"

    def __init__(self):
        self.kept = {}

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return self.kept.setdefault((o.shape, o.dtype), torch.empty_like(o)).copy_(o), lse


class DropsTheTail(_Broken):
    """Forgets the keys beyond the last whole tile of 64."""

    name = "drops-the-tail"

    def forward(self, q, k, v, spec):
        if k.shape[2] > 64 and not spec.causal:
            whole = k.shape[2] // 64 * 64
            k, v = k[:, :, :whole], v[:, :, :whole]
        return super().forward(q, k, v, spec)


class NotDeterministic(_Broken):
    """Atomic adds in the order the scheduler likes."""

    name = "not-deterministic"
    calls = 0

    def backward(self, do, q, k, v, o, lse, spec):
        dq, dk, dv = super().backward(do, q, k, v, o, lse, spec)
        NotDeterministic.calls += 1
        return dq * (1 + NotDeterministic.calls % 2 * 2.0**-23), dk, dv


class RunsWhatItRefuses(_Broken):
    """Says no softcap, and computes without it when asked."""

    name = "runs-what-it-refuses"
    capability = dataclasses.replace(_Broken.capability, features=_Broken.capability.features - {"softcap"})

    def why_not(self, problem, device):
        return [reason for reason in super().why_not(problem, device) if reason != "no softcap"]


class RoundsTheScale(_Broken):
    """A scale kept in bf16: off in its third digit."""

    name = "rounds-the-scale"

    def forward(self, q, k, v, spec):
        return super().forward((q * 1.0039).to(q.dtype), k, v, spec)


# bug -> a test that must fail for it
CAUGHT_BY = {
    TopLeftCausal: "test_visible_keys",
    EmptyRowsAreNaN: "test_empty_rows",
    FiniteMinusInfinity: "test_empty_rows",
    LeaksHiddenNaN: "test_hidden_values_reach_nothing",
    SwallowsNaN: "test_visible_nan_reaches_exactly_its_rows",
    LseInLog2: "test_lse_is_natural_and_wide",
    ForgetsTheGroup: "test_grouped_heads",
    ReadsDense: "test_layouts",
    ReadsDenseUpstream: "test_upstream_gradients",
    WritesItsInput: "test_inputs_are_never_written",
    ReusesItsOutput: "test_outputs_are_not_reused",
    DropsTheTail: "test_lengths_around_tiles",
    NotDeterministic: "test_repeats_are_bitwise_equal",
    RunsWhatItRefuses: "test_what_is_not_declared_is_refused_in_words",
    RoundsTheScale: "test_golden_two_by_two",
}
