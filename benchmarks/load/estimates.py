"""Medians over rounds and how sure they are: percentile bootstrap (Efron, 1979)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sample = NDArray[np.float64]
_RESAMPLES = 4000
_CONFIDENCE = 95.0
_SEED = 6  # the same file always gives the same report


@dataclass(frozen=True)
class Estimate:
    """A median over `rounds` and its 95 % interval. One round has no interval: `low` and `high` are None."""

    value: float
    low: float | None
    high: float | None
    rounds: int

    def text(self, digits: int = 2) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def median(values: Sequence[float]) -> Estimate | None:
    """Of one figure in each round; None of none. Rounds without the figure (NaN) are left out."""
    sample = _finite(values)
    if not len(sample):
        return None
    return _estimate(float(np.median(sample)), _medians(sample), len(sample))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """Median of the ratios within each round, so that drift of the machine meets both alike."""
    return median([a / b if b else float("nan") for a, b in zip(ours, theirs, strict=True)])


def unpaired_ratio(new: Sequence[float], old: Sequence[float]) -> Estimate | None:
    """Ratio of the medians of two runs, whose rounds have nothing to do with each other."""
    one, other = _finite(new), _finite(old)
    if not len(one) or not len(other) or not np.median(other):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _medians(one, _SEED) / _medians(other, _SEED + 1)
    value = float(np.median(one) / np.median(other))
    return _estimate(value, ratios[np.isfinite(ratios)], min(len(one), len(other)))


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


def _medians(sample: Sample, seed: int = _SEED) -> Sample:
    picks = np.random.default_rng(seed).integers(0, len(sample), (_RESAMPLES, len(sample)))
    return np.median(sample[picks], axis=1)  # type: ignore[no-any-return]


def _estimate(value: float, resampled: Sample, rounds: int) -> Estimate:
    if rounds < 2 or not len(resampled):
        return Estimate(value, None, None, rounds)
    tail = (100 - _CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value, float(low), float(high), rounds)
