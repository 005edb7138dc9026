"""Means, intervals and scores at equal budgets. Pure, standard library only.

All intervals are of 95 % and over seeds: the spread of whole trainings, not of the episodes within one.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; a single seed has none (``low`` and ``high`` are None)."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Curve:
    """One cell's measure along a budget: ``xs`` rise (episodes, tokens or seconds), ``ys`` in the measure's units."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.ys):
            raise ValueError(f"a curve needs one y for each x, got {len(self.xs)} and {len(self.ys)}")
        if any(later < earlier for earlier, later in zip(self.xs, self.xs[1:], strict=False)):
            raise ValueError(f"a curve's budgets must rise, got {self.xs}")


@dataclass(frozen=True)
class Band:
    """Mean and interval of several curves at common budgets; ``low`` and ``high`` are empty for a single curve."""

    xs: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def t_probability(t: float, df: int) -> float:
    """P(|T| ≤ t) of Student's t with ``df`` ≥ 1 whole degrees of freedom.

    Abramowitz & Stegun 26.7.3 and 26.7.4: finite sums in θ = arctan(t / √df).
    """
    theta = math.atan(t / math.sqrt(df))
    cosine, sine = math.cos(theta), math.sin(theta)
    if df == 1:
        return 2 * theta / math.pi
    term = cosine if df % 2 else 1.0
    total = term
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| ≤ t) = ``confidence``, to 12 digits. Raises ValueError for df < 1."""
    if df < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {df}")
    low, high = 0.0, 1.0
    while t_probability(high, df) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < confidence else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean ± t · s / √n, s the unbiased standard deviation. Of paired differences it is the paired interval.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values have no mean; leave out what has no finished seed")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def bootstrap_interval(values: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean: ``draws`` samples of n values with replacement; None for one value."""
    if len(values) < 2:
        return None
    generator = random.Random(seed)
    means = sorted(math.fsum(generator.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return percentile(means, (1 - CONFIDENCE) / 2), percentile(means, (1 + CONFIDENCE) / 2)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0…1) of an ordered sequence lies, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def value_at(curve: Curve, x: float) -> float | None:
    """The curve's y at budget ``x``, linear between evaluations; None outside of what was evaluated."""
    if not curve.xs or not curve.xs[0] <= x <= curve.xs[-1]:
        return None
    after = next(index for index, place in enumerate(curve.xs) if place >= x)
    if curve.xs[after] == x:
        return curve.ys[after]
    left, right = curve.xs[after - 1], curve.xs[after]
    share = (x - left) / (right - left)
    return curve.ys[after - 1] + share * (curve.ys[after] - curve.ys[after - 1])


def common_reach(curves: Sequence[Curve]) -> float | None:
    """The largest budget that every curve reached; None for no curves."""
    return min((curve.xs[-1] for curve in curves if curve.xs), default=None)


def band(curves: Sequence[Curve]) -> Band:
    """Mean and interval at every budget where some curve was evaluated and that all reached."""
    begin, reach = max((curve.xs[0] for curve in curves), default=0.0), common_reach(curves)
    xs = sorted({x for curve in curves for x in curve.xs if reach is not None and begin <= x <= reach})
    estimates = []
    for x in xs:
        values = [value_at(curve, x) for curve in curves]
        estimates.append(mean_interval([value for value in values if value is not None]))
    means = tuple(estimate.mean for estimate in estimates)
    lows = tuple(estimate.low for estimate in estimates if estimate.low is not None)
    highs = tuple(estimate.high for estimate in estimates if estimate.high is not None)
    return Band(tuple(xs), means, lows, highs)
