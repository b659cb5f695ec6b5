"""Medians over rounds and how sure they are, without assuming how figures are distributed.

From six rounds on: the interval between two order statistics that holds the true median in 95 % of the cases or more,
whatever the distribution (the sign test's; Conover, Practical Nonparametric Statistics, 3.2). Fewer rounds can't say so
much, and a bootstrap of theirs says too much (of three to five its "95 %" held 50 to 75 %): the least and the greatest
are told, and are called that.

Verdicts are many at once, and an interval of ranks can't be as sure as that wants with six rounds: theirs are
Student's, of the logarithms, and hold for all figures of a comparison together in 99 % of the cases (Bonferroni).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from synthia_vllm.bench.student import quantile

Sample = NDArray[np.float64]
ENOUGH = 6  # rounds for an interval: with five the least and the greatest hold the median in 93.75 %
_CONFIDENCE = 0.95
FALSE = 0.01  # how often one or more of all verdicts may be wrong


@dataclass(frozen=True)
class Estimate:
    """A median over `rounds`, and the ends of what it may be; None of one round.

    They are those of a 95 % interval from `ENOUGH` rounds on (of a verdict: see above), and else the least and the
    greatest.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int

    def text(self, digits: int = 2) -> str:
        """`1.38 [1.31, 1.43]`, of few rounds `1.38 (1.31 to 1.43)`, of one `1.38`."""
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        low, high = f"{self.low:.{digits}f}", f"{self.high:.{digits}f}"
        return f"{self.value:.{digits}f} " + (f"[{low}, {high}]" if self.rounds >= ENOUGH else f"({low} to {high})")


def median(values: Sequence[float]) -> Estimate | None:
    """Of one figure in each round; None of none. Rounds without the figure (NaN) are left out."""
    sample = _finite(values)
    if not len(sample):
        return None
    low, high = _ends(sample, _CONFIDENCE) if len(sample) > 1 else (None, None)
    return Estimate(float(np.median(sample)), low, high, len(sample))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """Median of the ratios within each round, so that drift of the machine meets both alike."""
    return median([a / b if b else float("nan") for a, b in zip(ours, theirs, strict=True)])


def paired_verdict(ours: Sequence[float], theirs: Sequence[float], figures: int) -> Estimate | None:
    """As `paired_ratio`, one of so many that are judged together."""
    found = paired_ratio(ours, theirs)
    ratios = _finite([a / b if b else float("nan") for a, b in zip(ours, theirs, strict=True)])
    if found is None or found.rounds < ENOUGH or ratios.min() <= 0:
        return found
    logs = np.log(ratios)
    return _around(float(logs.mean()), _error(logs), len(logs) - 1, figures, len(logs))


def unpaired_ratio(new: Sequence[float], old: Sequence[float], figures: int = 1) -> Estimate | None:
    """Of two runs, whose rounds have nothing to do with each other, one of so many ratios that are judged together.

    From `ENOUGH` rounds on both sides on Welch's interval of the geometric means' ratio. Of fewer the medians' ratio,
    and from the least of one over the greatest of the other to the reverse.
    """
    one, other = _finite(new), _finite(old)
    if not len(one) or not len(other) or not np.median(other):
        return None
    rounds = min(len(one), len(other))
    if rounds >= ENOUGH and min(one.min(), other.min()) > 0:
        logs, old_logs = np.log(one), np.log(other)
        errors = _error(logs), _error(old_logs)
        freedom = _freedom((errors[0], len(logs)), (errors[1], len(old_logs)))
        return _around(float(logs.mean() - old_logs.mean()), float(np.hypot(*errors)), freedom, figures, rounds)
    value = float(np.median(one) / np.median(other))
    if rounds < 2 or other.min() <= 0:
        return Estimate(value, None, None, rounds)
    return Estimate(value, float(one.min() / other.max()), float(one.max() / other.min()), rounds)


def _around(log: float, error: float, freedom: int, figures: int, rounds: int) -> Estimate:
    reach = quantile(1 - FALSE / figures, freedom) * error
    return Estimate(float(np.exp(log)), float(np.exp(log - reach)), float(np.exp(log + reach)), rounds)


def _error(logs: Sample) -> float:
    """Standard error of their mean."""
    return float(logs.std(ddof=1) / np.sqrt(len(logs)))


def _freedom(*sides: tuple[float, int]) -> int:
    """Degrees of freedom of two errors together (Welch, 1947), rounded down: none too narrow an interval."""
    both = sum(error**2 for error, _ in sides) ** 2
    apart = sum(error**4 / (count - 1) for error, count in sides)
    return int(both / apart) if apart else min(count for _, count in sides) - 1


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    sample = _finite(values)
    return float(sample.mean()) if len(sample) else float("nan")


def per_round(values: Sequence[tuple[int, float]], reduce: Callable[[Sequence[float]], float]) -> dict[int, float]:
    """Figures of one round made one: (round, figure) to round: figure."""
    rounds: dict[int, list[float]] = {}
    for number, value in values:
        rounds.setdefault(number, []).append(value)
    return {number: reduce(figures) for number, figures in sorted(rounds.items())}


def _finite(values: Sequence[float]) -> Sample:
    sample: Sample = np.asarray([value for value in values if np.isfinite(value)], dtype=np.float64)
    return sample


def _ends(sample: Sample, confidence: float) -> tuple[float, float]:
    """The innermost order statistics that hold the median so often, or the outermost there are."""
    ordered, count = np.sort(sample), len(sample)
    place, outside = 0, 1 / 2**count  # of the chance that the median is beyond one end
    while place + 1 < count // 2 and 1 - 2 * (outside + comb(count, place + 1) / 2**count) >= confidence:
        place += 1
        outside += comb(count, place) / 2**count
    return float(ordered[place]), float(ordered[-1 - place])
