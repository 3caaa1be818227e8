"""95% intervals for what is counted and averaged, and a win rate that length cannot buy. No model, no numpy.

The unit is always the prompt: what comes of one prompt is averaged first, since it is not independent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev, stdev

Z = NormalDist().inv_cdf(0.975)
PRIOR = 2.5
"""Standard deviation of the prior on both coefficients of `length_controlled`, as weak as in Gelman et al. 2008."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, from `n` independent units."""

    value: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """False where there are too few units for any interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def within(self, low: float, high: float) -> Interval:
        """The same with its ends inside what is possible, such as 0 and 1 for a mean of shares."""
        return Interval(self.value, max(low, self.low), min(high, self.high), self.n) if self.known else self

    def to_json(self) -> dict[str, float | int | None]:
        """As plain values; null for what is not known."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: part if math.isfinite(part) else None for name, part in parts.items()}, "n": self.n}


def rate(successes: float, n: int) -> Interval:
    """A share with its score interval (Wilson 1927); a tie is half a success.

    With ties it is wider than need be: half successes vary less than whole ones.

    Raises:
        ValueError: there are no units.
    """
    if n < 1:
        raise ValueError("a share of nothing")
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(max(0.0, p * (1 - p)) / n + z2 / (4 * n * n))
    # at both ends the formula gives 0 and 1 but for rounding
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return Interval(p, low, high, n)


def mean(values: Sequence[float]) -> Interval:
    """A mean with Student's t interval; without bounds for a single value.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean of nothing")
    middle = fmean(values)
    if len(values) < 2:
        return Interval(middle, -math.inf, math.inf, 1)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half, len(values))


@functools.cache
def t_quantile(df: int) -> float:
    """The t that |T| exceeds in 5% of all cases, for Student's T with `df` degrees of freedom.

    With t = √df·tan θ the density is cos(θ)^(df-1) up to a constant: smooth on a bounded range, so Simpson's rule
    and bisection are enough. With many degrees of freedom that peak is narrower than Simpson's pieces; there the
    expansion about the normal quantile is exact to 1e-7 (Abramowitz and Stegun 1964, 26.7.5).
    """
    if df > 200:
        return Z + (Z**3 + Z) / (4 * df) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * df**2)
    whole = _simpson(df, math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _simpson(df, middle) < 0.95 * whole else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _simpson(df: int, end: float, pieces: int = 400) -> float:
    step = end / pieces
    weights = (1.0 if i in (0, pieces) else 4.0 if i % 2 else 2.0 for i in range(pieces + 1))
    return step / 3 * sum(w * max(0.0, math.cos(i * step)) ** (df - 1) for i, w in enumerate(weights))


def length_controlled(wins: Sequence[float], longer_by: Sequence[float]) -> Interval:
    """The win rate that two models would have with answers of equal length.

    After AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, section 3): a logistic regression of the outcome on
    tanh(Δlength / sd(Δlength)), read at Δlength = 0. Left out is their term for how hard each instruction is, which is
    fitted over many models' answers. Instead of their cross-validated penalty both coefficients have a normal prior
    of mean 0 and standard deviation `PRIOR`, so that also an undefeated model has a finite estimate. The interval is
    the normal one of the intercept, from the curvature of the fit.

    Args:
        wins: 1 for a win, 0.5 for a tie, 0 for a loss; one a prompt.
        longer_by: length of the model's answer less that of the other's, in any unit.

    Raises:
        ValueError: there are no outcomes.
    """
    if not wins:
        raise ValueError("a win rate of nothing")
    spread = pstdev(longer_by)
    x = [math.tanh(value / spread) if spread else 0.0 for value in longer_by]
    a = b = 0.0
    haa, hab, hbb = 1.0, 0.0, 1.0
    for _ in range(50):
        p = [_logistic(a + b * value) for value in x]
        weight = [q * (1 - q) for q in p]
        ga = sum(y - q for y, q in zip(wins, p, strict=True)) - a / PRIOR**2
        gb = sum((y - q) * value for y, q, value in zip(wins, p, x, strict=True)) - b / PRIOR**2
        haa = sum(weight) + 1 / PRIOR**2
        hab = sum(w * value for w, value in zip(weight, x, strict=True))
        hbb = sum(w * value * value for w, value in zip(weight, x, strict=True)) + 1 / PRIOR**2
        determinant = haa * hbb - hab * hab
        da, db = (hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant
        a, b = a + da, b + db
        if abs(da) + abs(db) < 1e-10:
            break
    half = Z * math.sqrt(hbb / (haa * hbb - hab * hab))
    return Interval(_logistic(a), _logistic(a - half), _logistic(a + half), len(wins))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def call(found: Interval, *, chance: float = 0.5) -> str:
    """`better`, `worse` or `no better than chance`, by whether the interval excludes chance."""
    if found.low > chance:
        return "better"
    return "worse" if found.high < chance else "no better than chance"
