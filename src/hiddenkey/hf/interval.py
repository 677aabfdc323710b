"""How far a realised drop rate may lie from p by chance: bounds that hold for any number of draws."""

from __future__ import annotations

import math


def divergence(rate: float, p: float) -> float:
    """KL(Bernoulli(rate) || Bernoulli(p)) in nats, for 0 < p < 1."""
    terms = ((rate, p), (1 - rate, 1 - p))
    return sum(a * math.log(a / b) for a, b in terms if a > 0)


def surprise(rate: float, p: float, draws: float) -> float:
    """A bound on the probability that the mean of `draws` independent draws at p is as surprising as `rate`, or more.

    2 exp(-n KL(rate || p)): for n independent variables in [0, 1] with mean p each tail is below exp(-n KL), whatever
    n is (Hoeffding 1963, Theorem 1). A normal approximation is off by orders of magnitude where n p is small.
    """
    return min(1.0, 2 * math.exp(-draws * divergence(rate, p)))


def interval(rate: float, draws: float, level: float) -> tuple[float, float]:
    """All p for which `surprise` of the realised rate is above `level`: contains p but for that probability."""
    return _bound(rate, draws, level, 0.0), _bound(rate, draws, level, 1.0)


def _bound(rate: float, draws: float, level: float, end: float) -> float:
    """Bisection between the rate, which is inside, and an end of [0, 1]."""
    inside, outside = rate, end
    for _ in range(50):
        middle = (inside + outside) / 2
        if 0 < middle < 1 and surprise(rate, middle, draws) > level:
            inside = middle
        else:
            outside = middle
    return outside
