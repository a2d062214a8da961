"""What the host plans for the Gluon backward: how long each key tile takes."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from flash2.backends.gluon_hopper import gradients
from flash2.core.problem import Problem


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize(("seq_q", "seq_kv"), [(512, 512), (300, 411), (450, 200), (1, 700), (640, 1)])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (150, 0), (70, 90), (40, None)])
def test_steps_are_the_query_tiles_that_see_a_key(m, seq_q, seq_kv, left, right):
    for start in range(0, seq_kv, 128):
        keys = range(start, min(start + 128, seq_kv))
        seen = {
            i // m
            for i, j in itertools.product(range(seq_q), keys)
            if (right is None or j <= i + seq_kv - seq_q + right) and (left is None or j >= i + seq_kv - seq_q - left)
        }
        # the kernel's ranges are those of whole tiles, whose last rows may not exist
        assert len(seen) <= gradients.steps(start, m, seq_q, seq_kv, left, right) <= len(seen) + 1


def test_steps_of_a_causal_mask():
    assert [gradients.steps(start, 64, 512, 512, None, 0) for start in (0, 128, 256, 384)] == [8, 6, 4, 2]


MANY = Problem(batch=32, heads_q=32, seq_q=512, head_dim=64, dtype="bf16", causal=True, pass_="bwd")


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "a head by one program"),
        ({"batch": 4}, "fixed point"),  # fewer heads than multiprocessors
        ({"heads_kv": 4}, "fixed point"),  # and of keys
        ({"seq_q": 1024}, "fixed point"),  # more than the L2 cache holds
        ({"window": (100, 0)}, "fixed point"),
        ({"window": (511, 0)}, "a head by one program"),  # hides nothing
        ({"head_dim": 256}, "two kernels"),
    ],
    ids=str,
)
def test_how_the_deterministic_backward_adds_dq_up(changes, way):
    (line,) = gradients.described(MANY.replace(**changes), deterministic=True)
    assert way in line and "deterministic" in line and "not deterministic" not in line
    kernels = gradients.planned(MANY.replace(**changes), True)
    assert ("maxima" in kernels) == (way == "fixed point")
