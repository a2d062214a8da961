"""From raw samples to figures: quantiles, speed-up with a bootstrap interval, verdict. Standard library only."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000
CONFIDENCE = 0.95
SAME_WITHIN = 0.02  # a difference nobody can act on: medians move by this much between runs


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median with 20th and 80th percentile, milliseconds."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """baseline time / our time (above 1: we are faster), with its 95 % bootstrap interval.

    verdict: faster | slower (the interval leaves 1 out), same (it lies within 2 % of 1), else unclear.
    """

    baseline: str
    ratio: float
    low: float
    high: float
    verdict: str


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Median, 20th and 80th percentile (linear interpolation) of at least one sample."""
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Quantiles(statistics.median(ordered), at(0.2), at(0.8))


def speedup(
    baseline: str, base_rounds: Sequence[float], our_rounds: Sequence[float], *, paired: bool, seed: int = 0
) -> Speedup:
    """The ratio of two lists of per-round medians.

    paired: both were measured in turn in the same rounds, so the ratio is taken within each round
    and what moved both (clock, power) cancels. Otherwise the two lists are resampled independently.
    """
    rng = random.Random(seed)
    if paired:
        ratios = [base / ours for base, ours in zip(base_rounds, our_rounds, strict=True)]

        def resample() -> float:
            return statistics.median(rng.choices(ratios, k=len(ratios)))

        ratio = statistics.median(ratios)
    else:

        def resample() -> float:
            base = statistics.median(rng.choices(base_rounds, k=len(base_rounds)))
            return base / statistics.median(rng.choices(our_rounds, k=len(our_rounds)))

        ratio = statistics.median(base_rounds) / statistics.median(our_rounds)
    spread = sorted(resample() for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    low, high = spread[int(tail * RESAMPLES)], spread[int((1 - tail) * RESAMPLES) - 1]
    return Speedup(baseline=baseline, ratio=ratio, low=low, high=high, verdict=verdict(low, high))


def verdict(low: float, high: float) -> str:
    """What an interval of time ratios says."""
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        return "same"
    return "faster" if low > 1 else "slower" if high < 1 else "unclear"
