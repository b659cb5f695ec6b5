"""Four gateways before one engine, in virtual time and through a real Redis, against what holds for a single one."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from tests.gateway.fair.fleet import Fleet, Load
from tests.redis_service import RedisServer

TOKENS = 1000
CAPACITY = Capacity(tokens=TOKENS)
ALICE, BOB, CAROL = Account("alice"), Account("bob"), Account("carol")
WARM_S = 2.0  # without load, and then with it

simulated = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))


def gap(fleet: Fleet, loads: Sequence[Load], seconds: float, kills: Sequence[tuple[float, int]] = ()) -> float:
    """By how much the service of two of these users moved apart at most; kills are seconds from now, and whom."""
    users = [load.account.user for load in loads]
    began, coming = fleet.clock.now, sorted(kills)
    leads = []
    while fleet.clock.now < began + seconds:
        while coming and fleet.clock.now >= began + coming[0][0]:
            fleet.kill(coming.pop(0)[1])
        fleet.tick()
        leads.append([fleet.service[user] - fleet.service[users[0]] for user in users])
    moved = [(min(lead), max(lead)) for lead in zip(*leads, strict=True)]
    return max(most - least for least, most in moved)


def users(count: int, *, streams: int = 12, homes: bool = False, **load: int) -> list[Load]:
    load = {"prompt": 10, "most": 20} | load
    return [
        Load(Account(f"u{number}"), streams, begins=WARM_S, home=number % 4 if homes else None, **load)
        for number in range(count)
    ]


@st.composite
def backlogs(draw: st.DrawFn) -> list[Load]:
    """Users who always have more waiting than they get, at all gateways or at one."""
    sizes = st.tuples(st.integers(1, 60), st.integers(1, 40), st.sampled_from([None, 0, 1, 2, 3]))
    chosen = draw(st.lists(sizes, min_size=3, max_size=10))
    return [
        Load(Account(f"u{number}"), 4 * TOKENS // (prompt + most), prompt, most, home, WARM_S)
        for number, (prompt, most, home) in enumerate(chosen)
    ]


@simulated
@given(loads=backlogs(), kills=st.lists(st.tuples(st.floats(5.0, 40.0), st.integers(0, 3)), max_size=3))
def test_backlogged_users_of_all_gateways_stay_within_twice_the_papers_bound(
    redis_url: str, loads: list[Load], kills: list[tuple[float, int]]
) -> None:
    """Theorem 4.4 for one gateway: 2 max(w_p L_in, w_q M). Whichever gateway is killed, and whenever."""
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(2 * WARM_S)
    most = gap(fleet, loads, 40, kills)
    bound = 2 * max(1.0 * max(load.prompt for load in loads), 2.0 * TOKENS)
    assert most <= 2 * bound


@simulated
@given(loads=backlogs(), kills=st.lists(st.tuples(st.floats(5.0, 20.0), st.integers(0, 3)), max_size=2))
def test_together_they_hold_no_more_than_the_engines_and_a_request_each(
    redis_url: str, loads: list[Load], kills: list[tuple[float, int]]
) -> None:
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(WARM_S - 0.1)
    fleet.most = 0
    gap(fleet, loads, 20, kills)
    # A request each, and what the lengths of those that run were guessed too low by.
    largest = max(load.prompt + load.most for load in loads)
    assert fleet.most <= TOKENS + 4 * largest


@pytest.mark.parametrize("homes", [False, True], ids=["each at all gateways", "each at one"])
def test_the_engine_is_as_full_as_with_one_gateway(redis_url: str, homes: bool) -> None:
    loads = users(12, homes=homes)
    used = []
    for gateways in (1, 4):
        fleet = Fleet(
            redis_url,
            CAPACITY,
            [Load(one.account, 12, 10, 20, one.home and one.home % gateways) for one in loads],
            gateways=gateways,
        )
        fleet.run(30)
        used.append(sum(fleet.used[100:]) / len(fleet.used[100:]))
    assert used[1] >= 0.95 * used[0]


def test_weights_share_a_backlog_over_gateways(redis_url: str) -> None:
    heavy = Load(Account("heavy", weight=3.0), 60, 10, 20, home=0)
    fleet = Fleet(redis_url, CAPACITY, [heavy, Load(ALICE, 60, 10, 20, home=1)])
    fleet.run(60)
    assert 3 * fleet.service["heavy"] / fleet.service["alice"] == pytest.approx(3.0, rel=0.1)


def test_the_only_user_of_a_gateway_gets_no_more_than_one_of_many(redis_url: str) -> None:
    loads = [Load(ALICE, 40, 10, 20, home=3), *(Load(Account(f"u{n}"), 20, 10, 20, home=0) for n in range(9))]
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(100)
    others = [fleet.service[f"u{number}"] for number in range(9)]
    assert fleet.service["alice"] == pytest.approx(sum(others) / 9, rel=0.1)


def test_large_requests_at_one_gateway_lose_nothing_to_small_ones_at_another(redis_url: str) -> None:
    loads = [Load(ALICE, 4, 100, 300, home=3), *(Load(Account(f"u{n}"), 20, 10, 20, home=0) for n in range(9))]
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(20)
    assert gap(fleet, loads, 100) <= 2 * 2.0 * TOKENS


def test_credit_is_not_saved_up_by_being_away_from_all_gateways(redis_url: str) -> None:
    """Who comes back goes where he never was: his service there is none."""
    late = Load(CAROL, 40, 10, 20, home=2, begins=60)
    fleet = Fleet(redis_url, CAPACITY, [Load(ALICE, 40, 10, 20, home=0), Load(BOB, 40, 10, 20, home=1), late])
    fleet.run(60)
    before = dict(fleet.service)
    fleet.run(40)
    had = {user: service - before.get(user, 0.0) for user, service in fleet.service.items()}
    assert had["carol"] == pytest.approx(had["alice"], rel=0.15)
    assert had["carol"] == pytest.approx(had["bob"], rel=0.15)


def test_a_gateway_that_starts_anew_knows_what_users_had(redis_url: str) -> None:
    loads = [Load(ALICE, 40, 10, 20, home=0), Load(BOB, 40, 10, 20, home=0, begins=20)]
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(30)
    known = dict(fleet.members[0].scheduler.counters.service)
    fleet.kill(0)
    fleet.run(1)
    for user in ("alice", "bob"):
        assert fleet.members[0].scheduler.counters.service[user] >= known[user]


def test_batch_waits_for_interactive_users_of_other_gateways_and_gets_its_share(redis_url: str) -> None:
    nightly = Account("nightly", priority="batch")
    loads = [Load(ALICE, 40, 10, 20, home=0), Load(BOB, 40, 10, 20, home=1), Load(nightly, 40, 10, 20, home=2)]
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(28)
    assert fleet.service["nightly"] < 0.1 * fleet.service["alice"]
    fleet.run(12)
    before = dict(fleet.service)
    fleet.run(120)
    had = {user: service - before[user] for user, service in fleet.service.items()}
    assert 0.06 <= had["nightly"] / sum(had.values()) <= 0.15


def test_an_idle_gateways_request_does_not_wait(redis_url: str) -> None:
    fleet = Fleet(redis_url, CAPACITY, [Load(ALICE, 100, 10, 20, home=0), Load(BOB, 100, 10, 20, home=1)])
    fleet.run(20)
    ticket = fleet.submit(Load(CAROL, 1, 10, 20, home=3))
    assert ticket.running


def test_a_burst_at_one_gateway_has_all_of_the_engine(redis_url: str) -> None:
    fleet = Fleet(redis_url, CAPACITY, [Load(ALICE, 100, 10, 20, home=0, begins=WARM_S)])
    fleet.run(WARM_S + 0.5)
    assert fleet.held >= 0.85 * TOKENS


def test_redis_may_stand_still_for_two_seconds(redis_url: str) -> None:
    loads = users(12)
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(10)
    fleet.most = 0
    fleet.used.clear()
    fleet.redis_answers = False
    moved = gap(fleet, loads, 2)
    fleet.redis_answers = True
    moved = max(moved, gap(fleet, loads, 10))
    assert all(one.scheduler.room.capacity.tokens == TOKENS for one in fleet.members)
    assert moved <= 2 * 2.0 * TOKENS
    assert fleet.most <= TOKENS + 4 * 30
    assert sum(fleet.used) / len(fleet.used) >= 0.85


def test_each_has_its_part_while_redis_is_gone(redis_url: str) -> None:
    loads = users(12, homes=True)
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(10)
    fleet.redis_answers = False
    fleet.run(10)
    assert [one.scheduler.room.capacity.tokens for one in fleet.members] == [TOKENS // 4] * 4
    assert all(one.scheduler.room.tokens <= TOKENS // 4 for one in fleet.members)
    assert fleet.held >= 0.8 * TOKENS
    fleet.redis_answers = True
    fleet.most = 0
    moved = gap(fleet, loads, 20)
    assert moved <= 2 * 2.0 * TOKENS
    assert fleet.most <= TOKENS + 4 * 30
    assert all(one.scheduler.room.capacity.tokens == TOKENS for one in fleet.members)


def test_what_was_asked_again_since_the_answer_was_lost_counts_once(redis_url: str) -> None:
    fleet = Fleet(redis_url, CAPACITY, users(3), gateways=1)
    fleet.run(5)
    (member,) = fleet.members
    settlement, service = member.settlement, member.scheduler.counters.service
    first = settlement.question()
    for question in (first, first, settlement.question()):
        fleet.script(keys=settlement.keys, args=question)
        settlement.lost()
    fleet.run(2)
    fleet.script(keys=settlement.keys, args=first)  # it was long under way
    fleet.settle(member)
    assert {user.decode(): float(had) for user, had in fleet.redis.hgetall(settlement.keys[2]).items()} == service


def test_what_redis_holds_of_the_queue_goes_after_a_day(redis_url: str) -> None:
    fleet = Fleet(redis_url, CAPACITY, users(3))
    fleet.run(5)
    keys = fleet.redis.keys()
    assert sorted(key.decode() for key in keys) == sorted(fleet.members[0].settlement.keys)
    assert all(0 < fleet.redis.ttl(key) <= 86_400 for key in keys)


def test_the_only_gateways_successor_has_all_of_the_engine_soon(redis_url: str) -> None:
    fleet = Fleet(redis_url, CAPACITY, users(12), gateways=1)
    fleet.run(10)
    fleet.kill(0)
    fleet.run(4)
    assert fleet.held >= 0.85 * TOKENS


def test_a_redis_that_forgot_all_is_told_again(redis_server: RedisServer, redis_url: str) -> None:
    loads = users(12, homes=True)
    fleet = Fleet(redis_url, CAPACITY, loads)
    fleet.run(10)
    before = {user: float(had) for user, had in fleet.redis.hgetall(fleet.members[0].settlement.keys[2]).items()}
    fleet.redis.flushall()
    fleet.most = 0
    assert gap(fleet, loads, 10) <= 2 * 2.0 * TOKENS
    assert fleet.most <= TOKENS + 4 * 30
    for user, had in before.items():
        assert float(fleet.redis.hget(fleet.members[0].settlement.keys[2], user)) > had
