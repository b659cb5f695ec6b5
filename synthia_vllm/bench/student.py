"""Student's t distribution, for an integer number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""

from functools import cache
from math import atan, cos, pi, sin, sqrt, tan


def within(t: float, freedom: int) -> float:
    """The probability that |T| is less than `t`."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term, total = (cos(angle), 0.0) if odd else (1.0, 0.0)
    for n in range(1 + odd, freedom, 2):
        total += term
        term *= cos(angle) ** 2 * n / (n + 1)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


@cache
def quantile(confidence: float, freedom: int) -> float:
    """The `t` of which |T| is less with this probability."""
    low, high = 0.0, pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = within(sqrt(freedom) * tan(middle), freedom) < confidence
        low, high = (middle, high) if below else (low, middle)
    return sqrt(freedom) * tan(high)
