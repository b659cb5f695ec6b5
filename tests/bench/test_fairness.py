import pytest

from synthia_vllm.bench.fairness import fairness, jain
from synthia_vllm.bench.summary import Slo
from tests.bench.synthetic import failed, measurement, request

SLO = Slo(1.0, 1.0)


def test_jain_is_one_for_equal_shares() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)


def test_jain_is_one_over_n_where_one_has_all() -> None:
    assert jain([5, 0, 0, 0]) == pytest.approx(0.25)


def test_service_is_prompt_and_twice_the_generated_tokens_over_weight() -> None:
    made = measurement([request(0, 0.5, 1.0, user="a"), request(0, 0.5, user="b")], weights={"a": 2.0})
    found = fairness(made, SLO)
    assert [user.service for user in found.users] == [(10 + 2 * 2) / 2, 10 + 2 * 1]


def test_the_gap_grows_when_one_user_is_served_and_the_other_not() -> None:
    made = measurement([request(0, 1.0, user="a"), request(0, 3.0, user="b")], duration_s=4.0)
    found = fairness(made, SLO)
    at = dict(zip(found.times.round(1).tolist(), found.gap.tolist(), strict=True))
    assert (at[0.0], at[2.0], at[4.0]) == (0, 12, 0)


def test_attainment_of_a_user_counts_its_failures() -> None:
    made = measurement([request(0, 0.5, user="a"), failed(0, "cut", user="a")])
    assert fairness(made, SLO).users[0].attainment == 0.5


def test_a_user_without_an_answer_has_no_service() -> None:
    made = measurement([failed(0, "cut", user="a"), request(0, 0.5, user="b")])
    assert [user.service for user in fairness(made, SLO).users] == [0, 12]
