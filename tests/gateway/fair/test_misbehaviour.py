"""What one user does to the others, with the real scheduler in virtual time: each step of 0.1 s gives all a token."""

from collections.abc import Sequence
from statistics import median, quantiles

import pytest

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from tests.gateway.fair.crowd import Crowd, Kind

ALICE, BOB, CAROL = Account("alice"), Account("bob"), Account("carol")
NIGHTLY = Account("nightly", priority="batch")
EVERYBODY = [Account(f"u{number}") for number in range(20)]


def percentile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def share(crowd: Crowd, *accounts: Account) -> float:
    """Of the service, since the beginning."""
    return sum(crowd.service[account.user] * account.weight for account in accounts) / sum(crowd.service.values())


@pytest.mark.parametrize("batch_share", [0.1, 0.3])
def test_a_flood_of_batch_gets_its_share_and_no_more(batch_share: float) -> None:
    """Nine minutes of a backlog that is older than the ageing all the time."""
    flood = [Kind(ALICE, streams=6), Kind(BOB, streams=6), Kind(NIGHTLY, streams=70)]
    crowd = Crowd(Capacity(requests=4), flood, batch_share=batch_share)
    crowd.run_until(540)
    assert 0.7 * batch_share <= share(crowd, NIGHTLY) <= 1.2 * batch_share
    assert not crowd.of(ALICE, "late")
    assert not crowd.of(BOB, "late")


def test_batch_gets_what_interactive_users_leave() -> None:
    crowd = Crowd(Capacity(requests=32), [Kind(ALICE, streams=8, every=1.0), Kind(NIGHTLY, streams=200)])
    crowd.run_until(300)
    assert share(crowd, NIGHTLY) == pytest.approx(0.5, abs=0.05)
    assert len(crowd.of(ALICE)) > 0.98 * sum(one.kind.account == ALICE for one in crowd.asked)


def test_the_wait_beside_a_flood_of_batch_is_predicted() -> None:
    flood = [Kind(ALICE, streams=6), Kind(BOB, streams=6), Kind(NIGHTLY, streams=70)]
    crowd = Crowd(Capacity(requests=4), flood)
    crowd.run_until(540)
    for account in (ALICE, BOB, NIGHTLY):
        assert off(crowd, account) <= 0.3


def off(crowd: Crowd, account: Account) -> float:
    """By how much of the real wait the predicted one is wrong, in the median of the longer ones."""
    asked = [one for one in crowd.asked if one.kind.account == account and one.started is not None]
    return median(abs(one.predicted - one.waited) / one.waited for one in asked if one.waited >= 1.0)


def test_who_comes_back_is_lifted_within_his_class() -> None:
    """Batch has waited from the start, and had nothing: that is no measure for who is interactive."""
    kinds = [Kind(ALICE, streams=8), Kind(BOB, streams=8, begins=200.0), Kind(NIGHTLY, streams=4)]
    crowd = Crowd(Capacity(requests=4), kinds, max_wait=1e9, ageing=1e9)
    crowd.run_until(200)
    before = crowd.service["alice"]
    crowd.run_until(300)
    assert crowd.service["alice"] - before == pytest.approx(crowd.service["bob"], rel=0.1)


@pytest.mark.parametrize("lengths", [[64], range(34, 95, 4)], ids=["of one length", "of many lengths"])
def test_a_steady_user_beside_an_aggressor_does_not_wait(lengths: Sequence[int]) -> None:
    """The comparison's own load: one request a second, whose reply lasts longer than that, beside 192 streams."""
    heavy = [Kind(BOB, streams=192 // len(lengths), prompt=32, most=94, length=length) for length in lengths]
    crowd = Crowd(Capacity(requests=128), [Kind(ALICE, every=1.0, prompt=32, most=16), *heavy])
    crowd.run_until(300)
    first_tokens = [one.waited + crowd.step_s for one in crowd.of(ALICE)]
    assert len(first_tokens) > 250
    assert percentile(first_tokens, 50) <= 0.15
    assert percentile(first_tokens, 99) <= 0.15


def test_what_is_kept_for_newcomers_is_not_for_who_has_his_share() -> None:
    crowd = Crowd(Capacity(requests=32), [Kind(ALICE, streams=40, most=50), Kind(BOB, streams=40, most=50)])
    crowd.run_until(60)
    assert len(crowd.running) <= 30


def test_one_request_for_millions_of_tokens_makes_nobody_elses_refused() -> None:
    crowd = Crowd(Capacity(requests=1), [])
    running, millions, small = (crowd.ask(kind) for kind in (Kind(ALICE), Kind(BOB, most=4_000_000), Kind(CAROL)))
    assert running.started is not None
    assert millions.outcome == "evicted"
    assert small.outcome == ""


def test_who_takes_all_places_in_the_queue_loses_the_newest() -> None:
    crowd = Crowd(Capacity(requests=1), [], max_requests=50)
    first, *others = (crowd.ask(Kind(ALICE)) for _ in range(51))
    assert first.started is not None
    assert crowd.ask(Kind(BOB)).outcome == ""
    assert [one.outcome for one in others] == [""] * 49 + ["evicted"]
    assert crowd.ask(Kind(ALICE)).outcome == "refused"
    assert crowd.ask(Kind(BOB)).outcome == ""
    assert crowd.scheduler.queued_requests == 50


def test_the_weight_counts_for_the_share_of_the_queue() -> None:
    crowd = Crowd(Capacity(requests=1), [], max_requests=8)
    heavy = Account("heavy", weight=3.0)
    crowd.ask(Kind(CAROL))
    for _ in range(8):
        crowd.ask(Kind(ALICE))
    assert [crowd.ask(Kind(heavy)).outcome for _ in range(7)] == [""] * 6 + ["refused"]
    assert crowd.scheduler.waiting() == {"alice": 2, "heavy": 6}


def test_a_large_request_takes_places_of_those_alone_who_hold_more() -> None:
    crowd = Crowd(Capacity(requests=1), [], max_tokens=1000)
    crowd.ask(Kind(CAROL))
    many = [crowd.ask(Kind(ALICE, prompt=10, most=90)) for _ in range(7)]
    little = [crowd.ask(Kind(account, prompt=10, most=90)) for account in EVERYBODY[:3]]
    assert crowd.ask(Kind(BOB, prompt=100, most=400)).outcome == ""
    assert [one.outcome for one in many] == [""] * 2 + ["evicted"] * 5
    assert [one.outcome for one in little] == [""] * 3
    assert crowd.ask(Kind(CAROL, prompt=100, most=800)).outcome == "refused"


def served(hogs: Sequence[Kind]) -> int:
    """Replies that twenty users got in ten minutes beside these."""
    users = [Kind(account, streams=4, prompt=20, most=60) for account in EVERYBODY]
    crowd = Crowd(Capacity(tokens=2000), [*users, *hogs])
    crowd.run_until(600)
    return sum(len(crowd.of(account)) for account in EVERYBODY)


@pytest.mark.parametrize("streams", [1, 4])
def test_who_asks_for_all_and_leaves_again_and_again_takes_no_more_than_his_share(streams: int) -> None:
    hog = Kind(CAROL, streams=streams, prompt=20, most=1980, leaves=5.0)
    assert served([hog]) >= 0.92 * served([])


def test_small_requests_pass_one_that_has_no_room_for_a_bounded_time() -> None:
    crowd = Crowd(Capacity(tokens=160), [])
    crowd.ask(Kind(ALICE, prompt=10, most=90))
    large, small = crowd.ask(Kind(BOB, prompt=90, most=10)), crowd.ask(Kind(CAROL, prompt=5, most=15, pause=1e9))
    assert large.started is None
    assert small.started is not None
    crowd.run_until(3)
    late = crowd.ask(Kind(EVERYBODY[0], prompt=5, most=15, pause=1e9))
    assert late.started is None  # there is room for it, and it is kept for who has waited
    crowd.run_until(20)
    assert large.started is not None
    assert late.started is not None


def test_who_passes_stays_within_what_counters_may_differ_by() -> None:
    """Small requests beside large ones, each of which is passed for a while: the large ones lose no service."""
    kinds = [Kind(account, streams=4, prompt=20, most=60) for account in EVERYBODY]
    crowd = Crowd(Capacity(tokens=2000), [*kinds, Kind(CAROL, streams=2, prompt=500, most=900)], max_wait=1e9)
    crowd.run_until(600)
    others = [crowd.service[account.user] for account in EVERYBODY]
    assert crowd.service["carol"] >= median(others) - 2 * 2 * 2000
