"""Planted bugs in the text of the kernels: each is rejected by the problem that stands for its class in test_kernels."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from simulate import test_kernels

from flash2 import backends
from flash2.backends import numba_cuda_kernels


@dataclass(frozen=True)
class Mutant:
    """The kernels with `old` replaced by `new` at its `times` places, and the problem that shows it."""

    bug: str
    old: str
    new: str
    problem: str
    times: int = 1
    raises: type[Exception] = AssertionError


FIRST_SYNC = "            cuda.syncthreads()\n            for {} in range(CHUNK):"
MUTANTS = [
    Mutant("the diagonal one key too far right", "at + after + 1", "at + after + 2", "causal"),
    Mutant("the diagonal one key too far left", "at + after + 1", "at + after", "causal"),
    Mutant("a window one key too wide", "max(0, at - before)", "max(0, at - before - 1)", "window"),
    Mutant("aligned to the top left", "at = row + others - rows", "at = row", "causal-more-keys"),
    Mutant("the first tile of a window is skipped", "low // TILE * TILE", "low // TILE * TILE + TILE", "window"),
    Mutant("a tile stops where its first row does", "min(start + TILE, rows) - 1", "start", "causal-more-keys"),
    Mutant("keys see the window of queries", "seq_kv, seq_q, right, left", "seq_kv, seq_q, left, right", "window", 2),
    Mutant("no rescaling when the maximum moves", "alpha = float32(math.exp(m_i[i] - m_safe))", "alpha = ONE", "softcap"),
    Mutant("an empty row is not finite", "m_safe = ZERO if m_new == -INF else m_new", "m_safe = m_new", "causal-more-queries"),
    Mutant("hidden keys count in the sum", "value = -INF", "value = top", "causal"),
    Mutant("a thread sums its own columns only", "for t in range(SIDE):\n                total", "for t in range(1):\n                total", "full"),
    Mutant("lse without the sum", "m_i[i] + float32(math.log(total))", "m_i[i]", "full"),
    Mutant("softcap has no derivative", "ONE - t * t", "ONE", "softcap"),
    Mutant("the slope's sign", "return s - slope", "return s + slope", "alibi-causal"),
    Mutant("ALiBi's distance grows with keys alone", "abs(i - j)", "abs(j)", "alibi-causal"),
    Mutant("every head has the first one's slope", "h * slope_strides[1]", "0", "alibi-causal", 3),
    Mutant("the scale's sign is lost", "x * scale, ONE", "x * abs(scale), ONE", "scale-negative"),
    Mutant("columns past head_dim are read", " and d < head_dim", "", "causal-more-keys", raises=IndexError),
    Mutant("rows past the end are read", "if row < x[4] and", "if", "full", raises=IndexError),
    Mutant("the last row is not written", "if row < rows and tx", "if row < rows - 1 and tx", "full"),
    Mutant("columns past head_dim are written", " and tx + SIDE * c < head_dim", "", "full", raises=IndexError),
    Mutant("every batch reads the first", "batch * strides[0]", "0", "full"),
    Mutant("key heads are dealt out in turn", "h // (heads_q // heads_kv)", "h % heads_kv", "groups", 2),
    Mutant("a group's last head gives no gradient", "(h_kv + 1) * group)", "(h_kv + 1) * group - 1)", "one-key-head"),
    Mutant("dS without delta", "(dp - delta)", "dp", "full"),
    Mutant("a key's queries are one off", "row0 + query", "row0 + query - 1", "full"),
    Mutant("dk lacks the scale", "factor[i] = scale\n        store(dk", "factor[i] = ONE\n        store(dk", "full"),
    Mutant("dv has the scale", "factor[i] = ONE", "factor[i] = scale", "full"),
    Mutant("half of delta", "range(head_dim)", "range(head_dim // 2)", "full"),
    Mutant("products lose bits", "w * rows[n,", "float32(1.00001) * w * rows[n,", "full"),
    Mutant("a tile is used before it is there", FIRST_SYNC.format("d"), "            for d in range(CHUNK):", "full"),
    Mutant("rows are used before they are there", FIRST_SYNC.format("n"), "            for n in range(CHUNK):", "full"),
    Mutant("a tile is overwritten while it is used", "tx + SIDE * j]\n            cuda.syncthreads()", "tx + SIDE * j]", "full"),
    Mutant("rows are overwritten while they are used", "tx + SIDE * c]\n            cuda.syncthreads()", "tx + SIDE * c]", "full"),
    Mutant("a row's maximum is read too early", "= top\n            cuda.syncthreads()", "= top", "full"),
    Mutant("hidden weights meet NaN", "if low[i] <= y_start + n0 + n < high[i]:", "if True:", "hidden"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_planted_bug_is_caught(case, monkeypatch, tmp_path, mutant):
    text = Path(numba_cuda_kernels.__file__).read_text()
    assert text.count(mutant.old) == mutant.times, "the kernels no longer hold what the bug replaces"
    path = tmp_path / "kernels.py"
    path.write_text(text.replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(numba_cuda_kernels.__name__, path)
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    monkeypatch.setattr(backends, "numba_cuda_kernels", wrong)
    says = None if mutant.raises is not AssertionError or mutant.problem == "hidden" else r"breaks T|is nan|is not"
    with pytest.raises(mutant.raises, match=says):
        reject(case, mutant.problem)


def reject(case, problem: str):
    """The test that stands for `problem`."""
    if problem == "hidden":
        test_kernels.test_hidden_values_reach_not_one_bit(case, math.nan)
    else:
        test_kernels.test_problems(case, problem)
