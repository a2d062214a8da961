"""dQ added up in fixed point: the same whatever the order, within its bound, and as exact as in float32. And in float32,
in one order."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from emulator.gluon_emulator import emulated

from flash2.backends.gluon_hopper import backward, gradients, launch
from flash2.core.contract import spec_of
from flash2.core.inputs import make_inputs
from flash2.core.problem import Problem
from flash2.core.reference import attention_gradients, attention_reference

HEADS, ROWS, KEYS, D = 2, 300, 411, 64
PADDED = 384  # rows
PROBLEM = Problem(batch=1, heads_q=HEADS, heads_kv=1, seq_q=ROWS, seq_kv=KEYS, head_dim=D, dtype="bf16", causal=True)


@pytest.fixture(autouse=True)
def one_thread_only(one_thread):
    """Sums of torch's in one order."""


def gradients_of(x, seed: int = 0, *, fixed: bool = True) -> torch.Tensor:
    """dq of inputs x on the emulator, its programs in an order of that seed."""
    return sums_of(x, seed, gradients.choose(D, False, fixed))[0]


def sums_of(x, seed: int, config: gradients.Config, edits=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, what it was rounded from)."""
    o, lse = attention_reference(x.q, x.k, x.v, causal=True)
    scratches = []

    def scratch(self, device):
        scratches.append(plain(self, device))
        return scratches[-1]

    plain = gradients.Plan.scratch
    with (
        emulated(seed, edits),
        mock.patch.object(launch, "multiprocessors", return_value=3),
        mock.patch.object(gradients.Plan, "scratch", scratch),
        mock.patch.dict(launch._plans, clear=True),
    ):
        dq, _, _ = gradients.differentiate(
            x.do, x.q, x.k, x.v, o.to(x.q.dtype), lse.float(), spec_of(PROBLEM), config=config
        )
    return dq, scratches[0].acc[: HEADS * PADDED * x.q.shape[3] // (2 if config.fixed else 1)]


def in_one_order(x, config: gradients.Config, edits=None) -> bool:
    """Are the sums the same under every schedule tried?"""
    first, *others = (sums_of(x, seed, config, edits)[1] for seed in range(4))
    return all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("by_heads", [False, True])
def test_the_order_of_the_programs_does_not_matter(head_dim, softcap, by_heads):
    config = gradients.choose(head_dim, softcap, True, by_heads)
    assert (config.fixed, config.by_heads) == (not by_heads, by_heads)
    assert in_one_order(make_inputs(PROBLEM.replace(head_dim=head_dim), device="cpu"), config)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_matters_to_float32(head_dim):
    """What the test above would see."""
    config = gradients.choose(head_dim, False, False)
    assert not in_one_order(make_inputs(PROBLEM.replace(head_dim=head_dim), device="cpu"), config)


def test_it_matters_when_additions_are_carried_out():
    """TMA may be late with those of one key tile: then those of the next come first."""
    forgets = {"backward.dq_group": ("            additions_done()", "            pass")}
    x = make_inputs(PROBLEM, device="cpu")
    assert not in_one_order(x, gradients.choose(D, False, True, True), forgets)


@pytest.mark.parametrize("distribution", ["randn", "half", "x10", "shifted", "needle"])
def test_it_loses_nothing(distribution):
    """Against float64, no further off than float32 sums are."""
    x = make_inputs(PROBLEM, device="cpu", distribution=distribution)
    exact = attention_gradients(*(t.double() for t in (x.do, x.q, x.k, x.v)), causal=True)[0]
    off = {fixed: (gradients_of(x, fixed=fixed).double() - exact).norm() / exact.norm() for fixed in (True, False)}
    assert off[True] <= 1.01 * off[False], off


def test_tiny_and_huge_numbers():
    """Whose squares leave float32."""
    for factor in (1e-30, 1e25):
        x = make_inputs(PROBLEM, device="cpu")
        x.do.mul_(factor)
        x.v.mul_(1 / factor)
        plain = gradients_of(x, fixed=False).double()
        assert (gradients_of(x).double() - plain).norm() <= 0.004 * plain.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(bad):
    x = make_inputs(PROBLEM, device="cpu")
    x.do[0, 1, 7, 3] = bad
    dq = gradients_of(x)
    assert dq[0, 1, 7].isnan().all()
    assert dq[0, 1, [6, 8]].isfinite().all()
    assert dq[0, 0].isfinite().all()


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_the_largest_keys_and_values(bad):
    k, v = torch.randn(2, 3, KEYS, D).bfloat16(), torch.randn(2, 3, KEYS, D).bfloat16()
    if bad is not None:
        k[1, 0, KEYS - 1, 5] = v[0, 2, 40, 0] = bad
    chunks, share = 8, -(-KEYS // 8)
    out = torch.empty(6, chunks, 2)
    with emulated():
        backward.gluon_largest[(6 * chunks,)](
            k, v, out, *k.stride()[:3], *v.stride()[:3], 3, KEYS, D, share, CHUNKS=chunks, D=D, ROWS=16
        )
    for pair, chunk in itertools.product(range(6), range(chunks)):
        part = slice(chunk * share, min((chunk + 1) * share, KEYS))
        keys, values = k.flatten(0, 1)[pair, part].float(), v.flatten(0, 1)[pair, part].float()
        expected = torch.stack([keys.abs().max(), values.norm(dim=1).max()])
        torch.testing.assert_close(out[pair, chunk], expected, equal_nan=True)


def test_both_halves_of_an_integer_come_back():
    """A negative lower half has borrowed from the upper one."""
    low = torch.randint(-(2**31), 2**31, (64 * D // 2,), dtype=torch.int64)
    high = torch.randint(-(2**30), 2**30, (64 * D // 2,), dtype=torch.int64)
    dq = torch.empty(1, 1, 64, D)
    with emulated():
        backward.gluon_round_dq[(1,)](
            dq, (high << 32) + low, torch.full((64,), 0.5), *dq.stride()[:3], 1, 64, 1, D, 1.0,
            EVEN=True, FIXED=True, BM=64, D=D, N=D,
        )  # fmt: skip
    pairs = torch.stack([low, high], -1).reshape(4, D // 8, 2, 8, 4, 2)  # warp, columns, half, row, columns, column
    assert torch.equal(dq[0, 0], 2 * pairs.permute(0, 2, 3, 1, 4, 5).reshape(64, D).float())
