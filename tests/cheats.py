"""Backends that a harness must not believe: each gives a fast or a plausible answer it did not compute.

Most are accidents that happened (a wrong stream, a cached output, a partial write), not malice.
Each is a subclass of Honest, which the harness must believe, with one dishonest method.
"""

from __future__ import annotations

import threading
import time

import torch

from flash2.core.contract import Backend, Capability


def attend(q, k, v, spec):
    """Plain attention, full or causal, equal lengths."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ k.to(wide).mT * spec.scale
    if spec.causal:
        s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -torch.inf)
    lse = s.logsumexp(-1)
    return (torch.exp(s - lse[..., None]).to(v.dtype) @ v), lse


class Honest(Backend):
    """Does what it says: the control."""

    name = "honest"
    capability = Capability(
        devices=("cpu", "cuda"),
        precisions={"fp32": ("ieee",), "fp16": ("fp16",), "bf16": ("bf16",)},
        features=frozenset({"causal", "lse"}),
        backward=False,
    )

    def forward(self, q, k, v, spec):
        return attend(q, k, v, spec)


class StaleMemory(Honest):
    """Returns memory as it finds it, hoping that the answer is still there."""

    def forward(self, q, k, v, spec):
        return torch.empty_like(q), torch.empty_like(q[..., 0], dtype=torch.float32)


class PartialWrite(Honest):
    """Leaves the last rows of its output unwritten, as a grid one block short does."""

    def forward(self, q, k, v, spec):
        o, lse = attend(q, k, v, spec)
        short = torch.empty_like(o)
        short[:, :, :-3] = o[:, :, :-3]
        return short, lse


class CachesByPointer(Honest):
    """Knows a call by the address of its inputs and returns what it computed for that address."""

    def __init__(self):
        self.known = {}

    def forward(self, q, k, v, spec):
        key = (q.data_ptr(), k.data_ptr(), v.data_ptr(), q.shape)
        if key not in self.known:
            self.known[key] = attend(q, k, v, spec)
        return tuple(x.clone() for x in self.known[key])


class OnlyInWarmUp(Honest):
    """Computes while it is being checked and warmed up, then returns the last answer."""

    def __init__(self):
        self.calls = 0

    def forward(self, q, k, v, spec):
        self.calls += 1
        if self.calls <= 6:  # those before the timed ones, and the first of these, however few a slow machine makes
            self.last = attend(q, k, v, spec)
        return tuple(x.clone() for x in self.last)


class OneCallBehind(Honest):
    """Returns the answer to the call before, as a pipeline without a final wait does."""

    def __init__(self):
        self.last = None

    def forward(self, q, k, v, spec):
        now, before = attend(q, k, v, spec), self.last
        self.last = now
        return before if before is not None and before[0].shape == now[0].shape else now


class AnotherStream(Honest):
    """Works beside the stream that is timed: a side stream on a GPU, a thread on the CPU."""

    def forward(self, q, k, v, spec):
        o, lse = torch.empty_like(q), torch.empty_like(q[..., 0], dtype=torch.float32)
        if q.is_cuda:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(20_000_000)
                self._write(o, lse, q, k, v, spec)
        else:
            threading.Thread(target=self._later, args=(o, lse, q, k, v, spec)).start()
        return o, lse

    def _later(self, *arguments):
        time.sleep(0.05)
        self._write(*arguments)

    @staticmethod
    def _write(o, lse, q, k, v, spec):
        for out, x in zip((o, lse), attend(q, k, v, spec), strict=True):
            out.copy_(x)


class ZeroesInputs(Honest):
    """Makes the right answer zero, and returns zero."""

    def forward(self, q, k, v, spec):
        for x in (q, k, v):
            x.zero_()
        return attend(q, k, v, spec)


class MutatesInputs(Honest):
    """Folds the scale into q where q stands."""

    def forward(self, q, k, v, spec):
        return attend(q.mul_(1.0), k, v.add_(1e-3), spec)


class LowerPrecision(Honest):
    """Declares ieee fp32 and multiplies with 10 bits of mantissa, as TF32 does."""

    def forward(self, q, k, v, spec):
        return attend(*(self.cut(x) for x in (q, k, v)), spec)

    @staticmethod
    def cut(x):
        return (x.view(torch.int32) & -(1 << 13)).view(torch.float32) if x.dtype == torch.float32 else x


class EightBitProbabilities(Honest):
    """Rounds P to 8 bits and calls it fp16."""

    def forward(self, q, k, v, spec):
        s = q.float() @ k.float().mT * spec.scale
        lse = s.logsumexp(-1)
        p = torch.exp(s - lse[..., None]).to(torch.float8_e4m3fn).to(v.dtype)
        return p @ v, lse


class FallsBack(Honest):
    """Has a kernel of its own that never runs: the except clause calls torch."""

    capability = Capability(
        devices=("cpu", "cuda"),
        precisions=Honest.capability.precisions,
        features=frozenset({"causal"}),
        backward=False,
        kernels=r"^my_kernel",
    )

    def forward(self, q, k, v, spec):
        try:
            raise RuntimeError("my_kernel does not compile here")
        except RuntimeError:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=spec.causal), None


class Lazy(torch.Tensor):
    """A tensor that a subclass could fill whenever somebody looks."""


class DeferredWork(Honest):
    """Returns a tensor subclass, which may do its work outside the timed region."""

    def forward(self, q, k, v, spec):
        o, lse = attend(q, k, v, spec)
        return o.as_subclass(Lazy), lse


class ReturnsItsInput(Honest):
    """Returns a view of an input: right for one key, and nobody's own memory."""

    def forward(self, q, k, v, spec):
        return v, attend(q, k, v, spec)[1]


class StopsTheClock(Honest):
    """Replaces the clocks that are used to measure it."""

    def __init__(self):
        time.perf_counter = lambda: 0.0
        torch.cuda.Event.elapsed_time = lambda start, stop: 1e-9


CHEATS = {
    cls.__name__: cls
    for cls in (
        StaleMemory, PartialWrite, CachesByPointer, OnlyInWarmUp, OneCallBehind, AnotherStream, ZeroesInputs,
        MutatesInputs, LowerPrecision, EightBitProbabilities, FallsBack, DeferredWork, ReturnsItsInput,
    )
}  # fmt: skip
