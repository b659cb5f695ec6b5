"""How many replicas a load asks for."""

import asyncio
import itertools
import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from synthia_vllm.cluster.autoscaling import TokenLoadPolicy, replicas_for
from synthia_vllm.cluster.load import FRESH_S, Load, LoadReader, tell

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


class Clock:
    """The reader's."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    """Gateways that write, and the one that reads, a second apart."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reader = LoadReader(self.clock)
        self.board: dict[str, Load] = {}

    def second(self, alive: Mapping[str, int]) -> Load | None:
        """`alive`: the gateways that write in it, and how many tokens they have."""
        self.clock.now += 1
        for name, tokens in alive.items():
            before = self.board.get(name, Load())
            self.board[name] = Load(tokens=tokens, requests=1, beat=before.beat + 1)
        return self.reader.total(self.board)


@pytest.fixture
def gateways() -> Cluster:
    """A cluster that has run for a while, read all the time."""
    found = Cluster()
    for _ in range(3):
        found.second({"a": 5, "b": 7})
    return found


def tokens(load: Load | None) -> int | None:
    return load.tokens if load else None


def test_gateways_are_added_up(gateways: Cluster) -> None:
    found = gateways.second({"a": 5, "b": 7})
    assert found == Load(tokens=12, requests=2)


async def test_clocks_that_are_far_apart_play_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}

    class Board:
        def __init__(self, name: str) -> None:
            self.read, self.put, self.remove = kept.copy, kept.__setitem__, kept.__delitem__

    monkeypatch.setattr("synthia_vllm.cluster.private_ray.Board", Board)
    monkeypatch.setattr("synthia_vllm.cluster.load._PERIOD_S", 0.01)
    monkeypatch.setattr("time.time", itertools.cycle([0.0, 3600.0, 1e10]).__next__)
    reader = LoadReader()
    gateways = [asyncio.create_task(tell(name, lambda: Load(tokens=5, requests=1))) for name in ("a", "b")]
    async with asyncio.timeout(10):
        while reader.read() != Load(tokens=10, requests=2):
            await asyncio.sleep(0.02)
    for gateway in gateways:
        gateway.cancel()
    await asyncio.gather(*gateways, return_exceptions=True)
    assert kept == {}, "one that ends takes its value off the board"


def test_a_gateway_that_died_is_not_counted(gateways: Cluster) -> None:
    totals = [tokens(gateways.second({"a": 5})) for _ in range(int(FRESH_S) + 2)]
    assert totals[0] == 12
    assert totals[-1] == 5


def test_where_all_have_died_nothing_is_known(gateways: Cluster) -> None:
    assert [gateways.second({}) for _ in range(int(FRESH_S) + 2)][-1] is None


def test_a_new_gateway_counts_at_once(gateways: Cluster) -> None:
    assert tokens(gateways.second({"a": 5, "b": 7, "c": 100})) == 112


def test_a_reader_that_starts_anew_does_not_count_the_dead(gateways: Cluster) -> None:
    """It says nothing until it knows: one that died long ago, and one that is only slow, look the same at first."""
    gateways.reader = LoadReader(gateways.clock)
    totals = [tokens(gateways.second({"a": 5})) for _ in range(int(FRESH_S) + 2)]
    assert set(totals) == {None, 5}
    assert totals[-1] == 5


def test_a_reader_that_starts_anew_among_the_living_knows_soon(gateways: Cluster) -> None:
    gateways.reader = LoadReader(gateways.clock)
    assert [tokens(gateways.second({"a": 5, "b": 7})) for _ in range(2)] == [None, 12]


def test_after_a_time_without_a_board_nobody_counts_as_dead(gateways: Cluster) -> None:
    gateways.clock.now += 10 * FRESH_S
    assert [tokens(gateways.second({"a": 5})), tokens(gateways.second({"a": 5, "b": 7}))] == [None, 12]


def test_what_a_dead_gateway_wrote_is_removed_in_the_end(gateways: Cluster) -> None:
    for _ in range(700):
        gateways.second({"a": 5})
    assert gateways.reader.long_dead() == ["b"]


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
