"""Percentiles to a percent, for the live view: Prometheus' buckets are too wide to read a latency off them.

Durations are counted in buckets of which each is 2 % wider than the one before, so that a bucket's geometric middle is
within 1 % of all that is in it (as in DDSketch, Masson et al., VLDB 2019). Looking the bucket up takes ten comparisons.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from synthia_vllm.metrics.cells import Histogram

_GROWTH = 1.02
_LEAST, _MOST = 1e-5, 1e4  # seconds: what is less is told as 0, what is more as the last bound


def _bounds() -> tuple[float, ...]:
    found = [_LEAST]
    while found[-1] < _MOST:
        found.append(found[-1] * _GROWTH)
    return tuple(found)


BOUNDS = _bounds()


class Sketch(Histogram):
    """Durations, in seconds. Only the event loop writes here.

    `counts` stays the same list: whoever observes each token may hold on to it, and add to the place that
    `bisect_left(BOUNDS, seconds)` tells.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(BOUNDS)


def quantiles(counts: Sequence[int], *shares: float) -> list[float | None]:
    """Those of these shares, above 0 and up to 1; None where nothing was observed."""
    running = list(accumulate(counts))
    total = running[-1]
    return [_value(bisect_left(running, share * total)) if total else None for share in shares]


def _value(place: int) -> float:
    """What stands for all that is in this bucket."""
    if place == 0:
        return 0.0
    return BOUNDS[place - 1] * _GROWTH**0.5 if place < len(BOUNDS) else BOUNDS[-1]
