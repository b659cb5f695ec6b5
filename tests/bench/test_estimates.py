import numpy as np
import pytest

from synthia_vllm.bench.compare import TOLERANCE, verdict
from synthia_vllm.bench.estimates import median, paired_ratio, paired_verdict, unpaired_ratio
from synthia_vllm.bench.student import quantile


def test_one_round_has_no_interval() -> None:
    found = median([3.0])
    assert found is not None
    assert (found.value, found.low, found.high) == (3.0, None, None)


def test_no_round_has_no_estimate() -> None:
    assert median([float("nan")]) is None


def test_few_rounds_tell_the_least_and_the_greatest_and_call_them_that() -> None:
    three, six = median([1.0, 2.0, 5.0]), median([1.0, 2.0, 5.0, 6.0, 7.0, 8.0])
    assert three is not None
    assert six is not None
    assert (three.text(1), six.text(1)) == ("2.0 (1.0 to 5.0)", "5.5 [1.0, 8.0]")


def test_the_interval_of_three_rounds_reaches_from_least_to_greatest() -> None:
    found = median([1.0, 2.0, 5.0])
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 1.0, 5.0)


@pytest.mark.parametrize("rounds", [6, 7, 8, 12, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(rounds: int) -> None:
    """Skewed as times are; 1,000 trials, within three deviations of 95 %."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(1000):
        found = median(list(random.lognormal(0, 0.5, rounds)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1 <= found.high
    assert held >= 1000 * (0.95 - 3 * (0.95 * 0.05 / 1000) ** 0.5)


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 6, 10])
@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1])
def test_a_run_against_itself_is_told_as_changed_in_less_than_one_figure_of_a_hundred(
    rounds: int, noise: float
) -> None:
    random = np.random.default_rng(5)
    trials, told = 2000, 0
    for _ in range(trials):
        new, old = (list(random.lognormal(0, noise, rounds)) for _ in range(2))
        found = unpaired_ratio(new, old)
        assert found is not None
        told += verdict(found, True, TOLERANCE) != "same"
    # Two rounds of figures that scatter by a tenth are too few for any rule that finds something.
    assert told <= trials * (0.03 if (rounds, noise) == (2, 0.1) else 0.01)


@pytest.mark.parametrize("rounds", [6, 8, 12])
@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_a_run_against_itself_is_told_as_changed_in_one_comparison_of_a_hundred(rounds: int, noise: float) -> None:
    """Of all its figures, with no tolerance that would hide it; within three deviations."""
    random = np.random.default_rng(11)
    trials, figures, told = 200, 20, {"two runs": 0, "two servers": 0}
    for _ in range(trials):
        pairs = [(list(a), list(b)) for a, b in random.lognormal(0, noise, (figures, 2, rounds))]
        for kind, estimate in (("two runs", unpaired_ratio), ("two servers", paired_verdict)):
            found = [estimate(one, other, figures) for one, other in pairs]
            told[kind] += any(verdict(ratio, True, 0) != "same" for ratio in found if ratio is not None)
    assert max(told.values()) <= trials * (0.01 + 3 * (0.01 * 0.99 / trials) ** 0.5)


@pytest.mark.parametrize(
    ("confidence", "freedom", "t"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 5, 2.571), (0.99, 10, 3.169), (0.999, 5, 6.869), (0.999, 30, 3.646)],
)
def test_students_quantiles_are_those_of_the_tables(confidence: float, freedom: int, t: float) -> None:
    assert quantile(confidence, freedom) == pytest.approx(t, abs=0.0006)


@pytest.mark.parametrize(("rounds", "change"), [(2, 1.3), (3, 1.3), (5, 1.2), (6, 1.2), (10, 1.15)])
def test_a_change_that_matters_is_found(rounds: int, change: float) -> None:
    random = np.random.default_rng(7)
    found = [
        unpaired_ratio(
            [change * value for value in random.lognormal(0, 0.02, rounds)], list(random.lognormal(0, 0.02, rounds))
        )
        for _ in range(200)
    ]
    assert sum(verdict(one, True, TOLERANCE) == "better" for one in found if one is not None) >= 190


def test_a_ratio_to_nothing_is_left_out() -> None:
    found = paired_ratio([1.0, 2.0], [0.0, 1.0])
    assert found is not None
    assert (found.value, found.rounds) == (2.0, 1)


def test_the_same_data_give_the_same_interval() -> None:
    assert unpaired_ratio([1.0, 2.0, 4.0], [2.0, 3.0, 5.0]) == unpaired_ratio([1.0, 2.0, 4.0], [2.0, 3.0, 5.0])
