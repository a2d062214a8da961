"""Planted bugs in the kernels' helpers: each is rejected by the problem that stands for its class in test_kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import triton.language as tl

from flash2.backends.triton_fa2 import backward, forward, tiles

SHAPE = {"heads_q": 1, "heads_kv": 1, "head_dim": 16, "pass_": "fwd"}


@dataclass(frozen=True)
class Mutant:
    """A helper of the kernels, replaced by make(helper), and the (class, problem, how) that shows it."""

    bug: str
    helper: str
    make: Callable[[Callable], Callable]
    problem: dict[str, Any]
    precision: str = "ieee"
    how: dict[str, Any] | None = None


def called_with(**changes: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    """make(): the helper with some arguments, by name, changed."""

    def make(helper):
        names = helper.arg_names

        def wrong(*arguments):
            return helper(*(changes.get(n, lambda x: x)(x) for n, x in zip(names, arguments, strict=True)))

        return wrong

    return make


def returning(change: Callable) -> Callable[[Callable], Callable]:
    """make(): the helper with its result changed; `change` gets the result."""
    return lambda helper: lambda *arguments: change(helper(*arguments))


LONG = {"seq_q": 40, "seq_kv": 70}
MUTANTS = [
    Mutant("the diagonal one key too far right", "visible", called_with(i=lambda i: i + 1), {"seq_q": 70, "causal": True}),
    Mutant("the diagonal one key too far left", "visible", called_with(i=lambda i: i - 1), {"seq_q": 70, "causal": True}),
    Mutant("a window one key too wide", "visible", called_with(left=lambda x: x + 1), LONG | {"window": (9, 9)}),
    Mutant("a window one key too narrow", "visible", called_with(right=lambda x: x - 1), LONG | {"window": (9, 9)}),
    Mutant("keys past the end are seen", "visible", called_with(TAIL=lambda _: False), LONG, how={"distribution": "shifted"}),
    Mutant("the last tile of keys is skipped", "key_range", returning(lambda r: (*r[:3], r[2])), LONG),
    Mutant("a tile at the edge is not masked", "key_range", returning(lambda r: (r[0], r[1], r[2] + 32, r[3])),
           {"seq_q": 100, "causal": True}),
    Mutant("the first tile of a window is skipped", "key_range",
           returning(lambda r: (r[0] + 32, tl.maximum(r[0] + 32, r[1]), *r[2:])), {"seq_q": 130, "window": (40, 0)}),
    Mutant("the last piece of head_dim is left out", "add_chunk", called_with(head_dim=lambda n: n - 16),
           {"seq_q": 33, "head_dim": 45}),
    Mutant("a row past the end is read", "load_tile", called_with(seq=lambda n: n + 1),
           {"seq_q": 70, "seq_kv": 40}, how={"layout": "packed"}),
    Mutant("columns past head_dim are read", "load_tile", called_with(PAD_D=lambda _: False), LONG | {"head_dim": 5},
           how={"layout": "sliced"}),
    Mutant("the last row is not written", "store_tile", called_with(seq=lambda n: n - 1), LONG),
    Mutant("every batch reads the first", "head_of", called_with(batch=lambda b: b * 0), LONG | {"batch": 2}),
    Mutant("no rescaling when the maximum moves", "online_softmax",
           returning(lambda r: (r[0], r[1] * 0.0 + 1.0, *r[2:])), LONG, how={"distribution": "x3"}),
    Mutant("softcap's tanh is the identity", "tanh", lambda _: lambda x: x, LONG | {"softcap": 2.0}),
    Mutant("softcap has no derivative", "logits", returning(lambda r: (r[0], r[1] * 0.0)), LONG | {"softcap": 2.0, "pass_": "fwd+bwd"}),
    Mutant("the slope's sign", "logits", called_with(slope=lambda x: -x), LONG | {"alibi": True}),
    Mutant("ALiBi's distance grows twice as fast in keys", "logits", called_with(j=lambda j: j * 2), LONG | {"alibi": True}),
    Mutant("a factor missing from the logits", "logits", called_with(scale=lambda x: x * 1.01), LONG | {"softcap": 2.0}),
    Mutant("rows take their neighbours' statistics", "load_rows", called_with(start=lambda n: n * 0),
           {"seq_q": 70, "seq_kv": 40, "pass_": "fwd+bwd"}),
    Mutant("sums in half precision", "dot", returning(lambda x: x.to(tl.float16).to(tl.float32)), LONG),
    Mutant("bfloat16 is cut off, not rounded", "narrow", lambda _: lambda x, dtype: x.to(dtype),
           {"seq_q": 70, "seq_kv": 200}, "bf16"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_planted_bug_is_caught(case, device, monkeypatch, mutant):
    if device.type == "cuda":
        pytest.skip("a compiled kernel takes no patch")
    precise = case(mutant.precision)
    problem, how = precise.problem(**{**SHAPE, **mutant.problem}), mutant.how or {}
    wrong = mutant.make(getattr(tiles, mutant.helper, None) or getattr(forward, mutant.helper))
    for module in (tiles, forward, backward):
        if hasattr(module, mutant.helper):
            monkeypatch.setattr(module, mutant.helper, wrong)
    with pytest.raises(AssertionError, match=r"breaks T|is nan|is not"):
        precise.judge(problem, **how)
