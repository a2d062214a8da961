"""Hypothesis strategies: problems within what a backend declares, and ways for tensors to lie in memory."""

from __future__ import annotations

from hypothesis import strategies as st

from flash2.core.contract import Capability
from flash2.core.inputs import DISTRIBUTIONS, LAYOUTS, UPSTREAMS
from flash2.core.problem import Problem

# Lengths around the tiles that kernels are made of.
LENGTHS = (1, 3, 7, 15, 17, 63, 64, 65, 127, 128, 129)
HEAD_DIMS = (1, 3, 8, 16, 24, 40, 64, 72, 80, 96, 100, 128, 160, 256)

layouts = st.sampled_from(sorted(LAYOUTS))
upstreams = st.sampled_from(sorted(UPSTREAMS))
distributions = st.sampled_from(sorted(DISTRIBUTIONS))


@st.composite
def problems(draw, capability: Capability, dtype: str, precision: str) -> Problem:
    """Small problems that `capability` declares, every option drawn alone and together."""

    def maybe(feature: str, strategy, default):
        return draw(strategy) if feature in capability.features else default

    lengths = st.one_of(st.sampled_from(LENGTHS[:8]), st.integers(1, 70))
    seq_q = draw(lengths)
    seq_kv = maybe("cross", lengths, seq_q)
    heads_kv = draw(st.integers(1, 2))
    ends = st.one_of(st.none(), st.integers(0, 80))
    causal = maybe("causal", st.booleans(), False)
    window = maybe("window", st.one_of(st.none(), st.tuples(ends, ends)), None)
    right = 0 if causal else (window or (None, None))[1]
    if right is not None and "empty-rows" not in capability.features:
        seq_q = min(seq_q, seq_kv + right)
    return Problem(
        batch=draw(st.integers(1, 2)),
        heads_q=heads_kv * maybe("gqa", st.sampled_from([1, 2, 3]), 1),
        heads_kv=heads_kv,
        seq_q=seq_q,
        seq_kv=seq_kv,
        head_dim=draw(st.sampled_from([d for d in HEAD_DIMS if d in capability.head_dims and d <= 128])),
        dtype=dtype,
        precision=precision,
        causal=causal,
        window=window,
        softcap=maybe("softcap", st.sampled_from([0.0, 0.0, 2.0, 30.0]), 0.0),
        alibi=maybe("alibi", st.booleans(), False),
        scale=maybe("scale", st.sampled_from([None, None, 0.5, -0.2]), None),
        pass_="fwd+bwd" if capability.backward else "fwd",
    )
