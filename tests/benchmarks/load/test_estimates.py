import numpy as np

from benchmarks.load.estimates import median, paired_ratio, unpaired_ratio


def test_one_round_has_no_interval() -> None:
    found = median([3.0])
    assert found is not None
    assert (found.value, found.low, found.high) == (3.0, None, None)


def test_no_round_has_no_estimate() -> None:
    assert median([float("nan")]) is None


def test_the_interval_of_three_rounds_reaches_from_least_to_greatest() -> None:
    found = median([1.0, 2.0, 5.0])
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 1.0, 5.0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        found = median(list(random.normal(10, 2, 40)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 10 <= found.high
    assert held >= 88


def test_a_ratio_to_nothing_is_left_out() -> None:
    found = paired_ratio([1.0, 2.0], [0.0, 1.0])
    assert found is not None
    assert (found.value, found.rounds) == (2.0, 1)


def test_the_same_data_give_the_same_interval() -> None:
    assert unpaired_ratio([1.0, 2.0, 4.0], [2.0, 3.0, 5.0]) == unpaired_ratio([1.0, 2.0, 4.0], [2.0, 3.0, 5.0])
