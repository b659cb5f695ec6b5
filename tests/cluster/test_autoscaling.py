"""How many replicas a load asks for."""

import pickle
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from synthia_vllm.cluster.autoscaling import TokenLoadPolicy, replicas_for
from synthia_vllm.cluster.load import FRESH_S, Load, total

HELD = 10_000
loads = st.builds(
    Load,
    tokens=st.integers(0, 10 * HELD),
    queued_tokens=st.integers(0, 10 * HELD),
    requests=st.integers(1, 1000),
    tokens_per_replica=st.just(HELD),
)


def load(tokens: int, *, queued: int = 0, requests: int = 1) -> Load:
    return Load(tokens=tokens, queued_tokens=queued, requests=requests, tokens_per_replica=HELD)


def test_running_and_queued_tokens_count_together() -> None:
    assert replicas_for(load(8_000), 1, 0.8) == 1
    assert replicas_for(load(8_001), 1, 0.8) == 2
    assert replicas_for(load(8_000, queued=16_000), 1, 0.8) == 3


def test_any_request_keeps_one_replica_and_none_keeps_none() -> None:
    assert replicas_for(load(0), 3, 0.8) == 1
    assert replicas_for(load(0, requests=0), 3, 0.8) == 0


def test_the_first_request_of_a_cluster_at_rest_starts_one() -> None:
    assert replicas_for(Load(tokens=50_000, requests=40), 0, 0.8) == 1


def test_one_goes_only_when_the_others_have_room_to_spare() -> None:
    assert replicas_for(load(7_900), 2, 0.8) == 2
    assert replicas_for(load(6_000), 2, 0.8) == 1


@given(loads, st.integers(0, 20), st.floats(0.1, 2))
def test_the_number_settles_at_once(given_load: Load, current: int, target: float) -> None:
    """A steady load never makes replicas come and go: what it asks for, it asks for again when that is there."""
    wanted = replicas_for(given_load, current, target)
    assert replicas_for(given_load, wanted, target) == wanted


@given(loads, st.integers(0, 20), st.floats(0.1, 2))
def test_what_it_asks_for_carries_the_load(given_load: Load, current: int, target: float) -> None:
    wanted = replicas_for(given_load, current, target)
    assert wanted >= 1
    assert given_load.tokens + given_load.queued_tokens <= wanted * HELD * target * (1 + 1e-9)


@given(st.integers(1, 20), st.floats(0.1, 2), st.floats(0.95, 1.05))
def test_a_load_that_wavers_at_a_threshold_takes_nothing_away(current: int, target: float, wave: float) -> None:
    at_threshold = (current - 1) * HELD * target
    assert replicas_for(load(int(at_threshold * wave)), current, target) >= current - (current == 1)


def test_a_gateway_that_died_is_not_counted() -> None:
    now = 1000.0
    alive, dead = Load(tokens=5, requests=1, at=now - 1), Load(tokens=7, requests=1, at=now - FRESH_S - 1)
    found = total([alive, dead], now)
    assert found is not None
    assert found.tokens == 5
    assert total([dead], now) is None


class KnownLoad(TokenLoadPolicy):
    """The policy with a load that is told, instead of read from the cluster."""

    def __init__(self, target_load: float, told: Load | None) -> None:
        super().__init__(target_load)
        self._follower = SimpleNamespace(fresh=lambda: told)  # type: ignore[assignment]


def decide(told: Load | None, current: int, *, running: int | None = None, **config: Any) -> int:
    options = {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 0, "downscale_delay_s": 0} | config
    context = SimpleNamespace(
        config=AutoscalingConfig(**options),
        current_num_replicas=current,
        target_num_replicas=current,
        running_replicas=[f"r{number}" for number in range(current if running is None else running)],
        total_num_requests=0,
        policy_state={},
    )
    decided: int = _apply_autoscaling_config(KnownLoad(0.8, told))(context)[0]
    return decided


def test_serve_applies_the_policy() -> None:
    assert decide(load(20_000), 1) == 3
    assert decide(load(20_000), 1, upscale_delay_s=60) == 1
    assert decide(load(100), 3) == 1
    assert decide(load(100), 3, downscale_delay_s=60) == 3
    assert decide(load(100), 0, min_replicas=0, upscale_delay_s=60) == 1, "from zero there is no delay"


def test_a_replica_that_still_starts_is_not_taken_away() -> None:
    assert decide(load(100), 2, running=1) == 2
    assert decide(load(0, requests=0), 1, running=0, min_replicas=0) == 1
    assert decide(load(30_000), 2, running=1) == 4


def test_without_word_from_a_gateway_nothing_changes() -> None:
    assert decide(None, 3) == 3


def test_serve_can_carry_the_policy_to_its_controller() -> None:
    name = "synthia_vllm.cluster.autoscaling:TokenLoadPolicy"
    policy = AutoscalingPolicy(policy_function=name, policy_kwargs={"target_load": 0.5})
    carried = pickle.loads(pickle.dumps(policy)).get_policy()
    assert carried(target_load=0.5)._target_load == 0.5
