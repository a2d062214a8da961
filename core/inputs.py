"""Seeded inputs: what the numbers are (distributions) and how they lie in memory (layouts)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flash2.core.contract import TORCH_DTYPES
from flash2.core.problem import Problem

# distribution -> what it is for.
DISTRIBUTIONS = {
    "randn": "standard normal",
    "half": "0.5 * standard normal: softmax close to uniform",
    "needle": "each query peaks at one visible key, v a ramp over positions: a key taken for its neighbour shows",
    "x3": "3 * standard normal: peaked rows",
    "x10": "10 * standard normal: logits of several hundred",
    "shifted": "every logit near -200, so lse is far below 0: a padded key scored 0 overflows exp(s - lse)",
    "extreme": "logits equal along each row, beyond -3e5 and +3e5: a finite stand-in for -inf hides such rows",
}
# layout -> how q, k, v and do lie in memory; values are the same in all but the expanded ones.
LAYOUTS = {
    "bhsd": "contiguous",
    "bshd": "a (batch, seq, heads, head_dim) buffer seen as (batch, heads, seq, head_dim)",
    "packed": "views of one (batch, seq, heads_q + 2 heads_kv, head_dim) buffer, NaN where seq_q and seq_kv differ",
    "sliced": "the front of a longer, wider buffer that holds NaN beyond the end",
    "offset": "a storage offset of one element, so that nothing is aligned",
    "strided": "every second element of a buffer: last stride 2, NaN between",
    "expanded-heads": "k and v with stride 0 over heads",
    "expanded-batch": "k and v with stride 0 over batch",
}
# What autograd hands to a backward: the strides of do are the upstream operation's.
UPSTREAMS = {
    "like": "do lies in memory as q does",
    "dense": "contiguous",
    "sum": "ones with stride 0 everywhere, from o.sum()",
    "cat": "a slice along head_dim of a wider buffer, from torch.cat",
    "transpose": "contiguous in (batch, seq, heads, head_dim), from o.transpose(1, 2)",
}


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Tensors of one problem: q, do (batch, heads_q, seq_q, head_dim); k, v (batch, heads_kv, seq_kv, head_dim);
    alibi_slopes float32 (heads_q,), or None for a problem without."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    alibi_slopes: torch.Tensor | None = None


def make_inputs(
    problem: Problem,
    *,
    distribution: str = "randn",
    layout: str = "bhsd",
    upstream: str = "like",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """The inputs of `problem`, equal for equal arguments on one kind of device; no gradient is required of them.

    `distribution`, `layout` and `upstream` are names from DISTRIBUTIONS, LAYOUTS and UPSTREAMS; ValueError lists them.
    """
    for name, value, known in (
        ("distribution", distribution, DISTRIBUTIONS),
        ("layout", layout, LAYOUTS),
        ("upstream", upstream, UPSTREAMS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    generator = torch.Generator(device).manual_seed(seed)
    work = torch.promote_types(TORCH_DTYPES[problem.dtype], torch.float32)

    def randn(heads: int, seq: int) -> torch.Tensor:
        shape = (problem.batch, heads, seq, problem.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=work)

    q, do = randn(problem.heads_q, problem.seq_q), randn(problem.heads_q, problem.seq_q)
    k, v = randn(problem.heads_kv, problem.seq_kv), randn(problem.heads_kv, problem.seq_kv)
    if distribution in _FACTORS:
        q, k, v, do = (_FACTORS[distribution] * x for x in (q, k, v, do))
    elif problem.seq_q and problem.seq_kv:
        q, k, v = _SHAPERS[distribution](problem, q, k, v, generator)
    dtype = TORCH_DTYPES[problem.dtype]
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    slopes = alibi_slopes(problem.heads_q, device) if problem.alibi else None
    q, k, v = _lay_out(layout, q, k, v)
    return Inputs(q, k, v, _lay_out_upstream(upstream, layout, do), slopes)


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 (heads,): 2^(-8/n), 2^(-16/n), ... for n heads; for other n than powers of two, those of the power
    below followed by every second one of the power above (Press et al., arXiv:2108.12409, section 3 and its code)."""
    below = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(heads - below)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


_FACTORS = {"randn": 1.0, "half": 0.5, "x3": 3.0, "x10": 10.0}


def _scale(problem: Problem) -> float:
    return problem.head_dim**-0.5 if problem.scale is None else problem.scale


def _needle(problem: Problem, q, k, v, generator):
    # Query i is its needle's key, long enough for a logit of about 10 among logits of about 1, plus noise.
    seq_q, seq_kv, device = problem.seq_q, problem.seq_kv, q.device
    left, right = problem.band
    place = torch.arange(seq_q, device=device) + seq_kv - seq_q
    low = (place - (seq_kv if left is None else left)).clamp(0, seq_kv - 1)
    high = (place + (seq_kv if right is None else right)).clamp(0, seq_kv - 1)
    chance = torch.rand(q.shape[:3], generator=generator, device=device)
    needle = (low + (chance * (high - low + 1)).long()).clamp(max=seq_kv - 1)
    keys = k.repeat_interleave(problem.heads_q // problem.heads_kv, dim=1)
    found = keys.gather(2, needle[..., None].expand(-1, -1, -1, problem.head_dim))
    length = 10 / (abs(_scale(problem)) * problem.head_dim or 1.0)
    ramp = torch.linspace(-1, 1, seq_kv, dtype=v.dtype, device=device)[:, None]
    return math.copysign(length, _scale(problem)) * found + 0.5 * q, k, ramp + 0.1 * v


def _shifted(problem: Problem, q, k, v, generator):
    # The middle column adds one constant to every logit; in the middle, so that neither order of summing is kinder.
    q, k = q.clone(), k.clone()
    constant = math.sqrt(200 / abs(_scale(problem) or 1.0))
    middle = problem.head_dim // 2
    q[..., middle], k[..., middle] = constant, -math.copysign(constant, _scale(problem))
    return q, k, v


def _extreme(problem: Problem, q, k, v, generator):
    # Powers of two, so that the logits of a row are equal to the last bit in every dtype and order of summing.
    constant = 2.0 ** min(15, math.ceil(math.log2(math.sqrt(3e5 / abs(_scale(problem) or 1.0)))))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0::2, 0], q[..., 1::2, 0], k[..., 0] = -constant, constant, constant
    return q, k, v


_SHAPERS: dict[str, Callable] = {"needle": _needle, "shifted": _shifted, "extreme": _extreme}


def _lay_out(layout: str, q, k, v):
    if layout == "packed":
        buffer = q.new_full(
            (q.shape[0], max(q.shape[2], k.shape[2]), q.shape[1] + 2 * k.shape[1], q.shape[3]), torch.nan
        )
        views, first = [], 0
        for x in (q, k, v):
            view = buffer[:, : x.shape[2], first : first + x.shape[1]].transpose(1, 2)
            views.append(view.copy_(x))
            first += x.shape[1]
        return tuple(views)
    if layout == "expanded-heads":
        return q, *(x[:, :1].contiguous().expand_as(x) for x in (k, v))
    if layout == "expanded-batch":
        return q, *(x[:1].contiguous().expand_as(x) for x in (k, v))
    return tuple(_place(layout, x) for x in (q, k, v))


def _place(layout: str, x: torch.Tensor) -> torch.Tensor:
    """A copy of x, (batch, heads, seq, head_dim), that lies in memory as `layout` says."""
    batch, heads, seq, dim = x.shape
    if layout == "bshd":
        home = x.new_empty(batch, seq, heads, dim).transpose(1, 2)
    elif layout == "sliced":
        home = x.new_full((batch, heads, seq + 5, dim + 3), torch.nan)[:, :, :seq, :dim]
    elif layout == "offset":
        home = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    elif layout == "strided":
        home = x.new_full((batch, heads, seq, 2 * dim), torch.nan)[..., ::2]
    elif layout == "cat":
        home = x.new_full((batch, heads, seq, 2 * dim), torch.nan)[..., :dim]
    else:
        return x
    return home.copy_(x)


def _lay_out_upstream(upstream: str, layout: str, do: torch.Tensor) -> torch.Tensor:
    if upstream == "sum":
        return do.new_ones(()).expand_as(do)
    if upstream == "like":
        return _place("bshd" if layout == "packed" else layout, do)
    return _place({"dense": "bhsd", "transpose": "bshd", "cat": "cat"}[upstream], do)
