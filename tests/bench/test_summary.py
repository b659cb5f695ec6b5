import math

import pytest

from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.summary import Load, Slo, Summary, load_of, summarize
from tests.bench.synthetic import failed, measurement, request, run

SLO = Slo(ttft_s=0.5, itl_s=0.1)


@pytest.fixture
def one() -> Measurement:
    """Two whole replies and a failed one in four seconds."""
    requests = [
        request(0.0, 0.2, 0.3, 0.5),
        request(1.0, 1.6, 1.7),
        failed(1.5, "cut"),
    ]
    return measurement(requests, duration_s=4.0, streams=2)


def test_ttft_counts_from_sending_to_the_first_chunk(one: Measurement) -> None:
    assert summarize(one, SLO).ttft.p50 == pytest.approx(0.4)


def test_ttft_does_not_count_the_clients_own_lateness() -> None:
    late = request(1.0, 1.2, due_s=0.0)
    figures = summarize(measurement([late]), SLO)
    assert (figures.ttft.p50, figures.late.p50) == (pytest.approx(0.2), pytest.approx(1.0))


def test_itl_is_every_gap_of_every_reply(one: Measurement) -> None:
    assert summarize(one, SLO).itl.mean == pytest.approx((0.1 + 0.2 + 0.1) / 3)


def test_tpot_is_the_time_after_the_first_token_over_the_tokens_after_it(one: Measurement) -> None:
    assert summarize(one, SLO).tpot.mean == pytest.approx((0.15 + 0.1) / 2)


def test_tpot_counts_tokens_where_a_chunk_carries_several() -> None:
    reply = request(0.0, 0.2, 0.6, output_tokens=5)
    assert summarize(measurement([reply]), SLO).tpot.p50 == pytest.approx(0.1)


def test_a_reply_of_one_token_has_no_tpot() -> None:
    assert math.isnan(summarize(measurement([request(0.0, 0.2)]), SLO).tpot.p50)


def test_throughput_counts_whole_replies_only(one: Measurement) -> None:
    figures = summarize(one, SLO)
    assert (figures.output_throughput, figures.request_throughput) == (5 / 4, 2 / 4)


def test_goodput_counts_requests_that_meet_the_slo(one: Measurement) -> None:
    # The first has a TPOT of 150 ms, the second a TTFT of 600 ms.
    assert summarize(one, SLO).goodput == 0
    assert summarize(one, Slo(0.5, 0.15 + 1e-9)).goodput == 1 / 4


def test_attainment_counts_failed_requests_as_missed(one: Measurement) -> None:
    assert summarize(one, Slo(9, 9)).attainment == pytest.approx(2 / 3)


def test_errors_are_counted_by_kind(one: Measurement) -> None:
    assert summarize(one, SLO).errors == {"cut": 1}


def test_percentiles_are_linear_between_neighbours() -> None:
    requests = [request(0.0, 0.1 * n) for n in range(1, 12)]
    assert summarize(measurement(requests), SLO).ttft.p90 == pytest.approx(1.0)


def test_a_measurement_without_a_whole_reply_has_no_latency() -> None:
    assert math.isnan(summarize(measurement([failed(0, "http 500")]), SLO).ttft.p99)


def test_invalid_measurements_are_in_no_figure(one: Measurement) -> None:
    late = one.model_copy(update={"invalid": ["late"], "round": 1})
    summary = Summary(run([one, late]))
    assert list(summary.rounds("ours", load_of(one), "output_throughput")) == [0]
    assert summary.invalid == [late]


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is twice as fast in the second round: the ratio stays."""
    made = [
        measurement([request(0, *([1.0] * count))], server=server, round=number, streams=1, duration_s=1.0)
        for number in (0, 1)
        for server, count in (("ours", 4 * (number + 1)), ("other", 2 * (number + 1)))
    ]
    found = Summary(run(made)).ratio("ours", "other", load_of(made[0]))
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_a_round_that_one_of_two_lacks_is_in_no_ratio() -> None:
    made = [measurement([request(0, 1.0)], server="ours", round=number, streams=1) for number in (0, 1)]
    made.append(measurement([request(0, 1.0)], server="other", round=1, streams=1))
    found = Summary(run(made)).ratio("ours", "other", load_of(made[0]))
    assert found is not None
    assert found.rounds == 1


@pytest.mark.parametrize("name", ["closed, 8 streams", "closed, 64 streams", "closed, 1 stream"])
def test_workloads_that_differ_in_streams_are_one_family(name: str) -> None:
    assert Load(name, "closed", 8).family == "closed"


def test_workloads_that_differ_in_rate_are_one_family() -> None:
    assert Load("open, Poisson, 2.5/s", "open", rate=2.5).family == "open, Poisson"


def test_a_name_with_other_numbers_keeps_them() -> None:
    assert Load("conversations, 8 users, 3 turns", "conversations").family == "conversations, 8 users, 3 turns"
