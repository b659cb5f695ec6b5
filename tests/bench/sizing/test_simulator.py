"""Against closed forms, against a plain simulation token by token, and against the product's own rules."""

import dataclasses
import itertools

import numpy as np
import pytest

from synthia_vllm.bench.sizing.autoscaler import wanted_replicas
from synthia_vllm.bench.sizing.engine_model import EngineModel
from synthia_vllm.bench.sizing.simulator import Cluster, run
from synthia_vllm.bench.sizing.traffic import Traffic, of_measurement, poisson
from synthia_vllm.bench.summary import Slo, tokens_of, tpot, ttft
from synthia_vllm.cluster.autoscaling import replicas_for
from synthia_vllm.cluster.load import Load
from tests.bench.synthetic import Engine, closed, open_loop

ONE_SLOT = EngineModel(knots=(0.0, 1.0), decode_s=(0.1, 0.1), prefill_s=0.0, max_seqs=1)
EXACT = EngineModel(knots=(0.0, 128.0), decode_s=(0.020, 0.020 + 128 * 0.0015), prefill_s=0.0002, overhead_s=0.004)
PLAIN = Cluster(fair_queue=False)


def test_one_slot_waits_as_m_d_1_says() -> None:
    """Pollaczek-Khinchine: rho * service / (2 * (1 - rho)) on average, beside the service itself."""
    rho, service = 0.7, 0.1
    traffic = poisson(200_000, rho / service, 1, 1, 1, seed=3)
    outcome = run(traffic, ONE_SLOT, PLAIN)
    assert outcome.ttft_s.mean() - service == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.03)


def test_a_server_with_work_never_rests() -> None:
    """All at once in one slot: the last ends after exactly the sum of the services."""
    traffic = dataclasses.replace(poisson(50, 1, 1, 1, 4), arrival=np.zeros(50))
    assert run(traffic, ONE_SLOT, PLAIN).duration_s == pytest.approx(50 * 4 * 0.1)


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_request_is_served_once(replicas: int) -> None:
    traffic = poisson(3000, 20 * replicas, 5, 100, 30, spread=0.8)
    outcome = run(traffic, EXACT, Cluster(replicas=replicas, max_wait_s=1e9, max_queued_requests=10**9))
    assert outcome.served == 3000
    assert outcome.step_count.sum() == (traffic.output - 1).sum()


@pytest.mark.parametrize("rate", [1.0, 4.0, 9.0])
def test_jumping_over_steps_gives_what_going_through_each_gives(rate: float) -> None:
    measured = open_loop(rate, engine=Engine(), requests=150, prompt=700)
    outcome = run(of_measurement(measured), EXACT, PLAIN)
    assert outcome.ttft_s == pytest.approx([ttft(request) for request in measured.requests], abs=1e-9)
    assert outcome.tpot_s == pytest.approx([tpot(request) or 0.0 for request in measured.requests], abs=1e-9)


def test_a_closed_loop_sends_the_next_when_one_ends() -> None:
    measured = closed(16, engine=Engine(), requests=64)
    outcome = run(of_measurement(measured), EXACT, PLAIN)
    assert outcome.output_throughput == pytest.approx(
        sum(map(tokens_of, measured.requests)) / measured.duration_s, rel=0.01
    )


def test_a_full_cache_keeps_requests_waiting() -> None:
    small = dataclasses.replace(EXACT, kv_tokens=200)
    traffic = dataclasses.replace(poisson(10, 1, 1, 64, 36), arrival=np.zeros(10))
    waits = np.sort(run(traffic, small, PLAIN).ttft_s)
    assert waits[2] > waits[1] + 35 * 0.020  # two fit at once


def test_users_in_overload_are_served_by_weight() -> None:
    count = 4000
    both = poisson(count, 200, 2, 10, 20)
    traffic = dataclasses.replace(both, weights=(3.0, 1.0))
    slow = dataclasses.replace(EXACT, max_seqs=4)
    outcome = run(traffic, slow, Cluster(max_wait_s=1e9, max_queued_requests=10**9))
    came = traffic.arrival + outcome.ttft_s
    early = np.argsort(came)[: count // 3]
    first = (traffic.user[early] == 0).sum()
    assert first / (len(early) - first) == pytest.approx(3.0, rel=0.1)


def test_a_full_queue_refuses() -> None:
    traffic = dataclasses.replace(poisson(500, 1, 1, 10, 20), arrival=np.zeros(500))
    slow = dataclasses.replace(EXACT, max_seqs=4)
    outcome = run(traffic, slow, Cluster(max_queued_requests=100))
    # Of four places one is kept for users who have nothing running.
    assert outcome.served == 100 + 3
    assert outcome.ttft(99) == float("inf")


def test_more_replicas_do_not_make_anyone_wait_longer() -> None:
    traffic = poisson(3000, 30, 5, 100, 60)
    waits = [run(traffic, EXACT, Cluster(replicas=n)).ttft(99) for n in (4, 8, 16)]
    assert waits == sorted(waits, reverse=True)


def conversations(replicas_cached: bool) -> Traffic:
    """Ten clients, each with 20 turns whose prompts grow; the cache holds all but the last turn."""
    turns, clients = 20, 10
    count = turns * clients
    turn, client = np.divmod(np.arange(count), clients)
    follower = np.where(turn < turns - 1, np.arange(count) + clients, -1)
    prompt = 200 * (turn + 1)
    return Traffic(
        arrival=np.where(turn == 0, 0.01 * client, np.inf),
        user=client,
        prompt=prompt,
        output=np.full(count, 20),
        follower=follower,
        think=np.full(count, 0.5),
        session=client,
        cached=(prompt - 200) if replicas_cached else np.zeros(count, dtype=np.int64),
        weights=(1.0,) * clients,
    )


def test_a_conversation_finds_its_cache_where_it_was() -> None:
    cold, warm = (run(conversations(cached), EXACT, Cluster(replicas=4)).ttft(90) for cached in (False, True))
    assert warm < 0.5 * cold


def test_the_autoscaler_wants_what_the_products_policy_wants() -> None:
    loads = itertools.product((0, 900, 50_000), (0, 3_000, 200_000), (0, 1, 40), (1, 2, 7, 30), (0.5, 0.8, 1.2))
    for tokens, queued, requests, current, target in loads:
        load = Load(tokens=tokens, queued_tokens=queued, requests=requests, tokens_per_replica=10_000)
        wanted = wanted_replicas(float(tokens), float(queued), float(requests), 10_000, current, target)
        assert wanted == replicas_for(load, current, target), (load, current, target)


def test_the_autoscaler_adds_replicas_under_load_and_they_serve_it() -> None:
    small = dataclasses.replace(EXACT, kv_tokens=4000)
    traffic = poisson(6000, 30, 5, 100, 60)
    scaled = Cluster(replicas=1, max_replicas=20, startup_s=10.0)
    outcome = run(traffic, small, scaled)
    late = outcome.ttft_s[len(traffic) // 2 :]
    assert outcome.most_replicas > 1
    assert np.percentile(late, 50) < 0.5


def test_an_aborted_run_says_so() -> None:
    outcome = run(poisson(5000, 100, 1, 100, 60), EXACT, PLAIN, ttft_limit_s=0.1, late_share=0.01)
    assert outcome.aborted


def test_attainment_is_the_share_within_both_limits() -> None:
    outcome = run(poisson(500, 1, 1, 10, 20), EXACT, PLAIN)
    assert outcome.attainment(Slo(1.0, 1.0)) == 1.0
    assert outcome.attainment(Slo(1.0, 0.001)) == 0.0
