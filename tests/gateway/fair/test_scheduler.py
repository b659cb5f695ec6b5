import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from tests.gateway.fair.simulated import SimulatedEngine

ALICE, BOB = Account("alice"), Account("bob")


def one_at_a_time(**options: object) -> SimulatedEngine:
    return SimulatedEngine(Capacity(requests=1), **options)


def users(engine: SimulatedEngine) -> str:
    return "".join(ticket.user[0] for ticket in engine.order)


def test_nothing_waits_while_the_engine_has_room() -> None:
    engine = SimulatedEngine(Capacity(requests=32))
    for _ in range(16):
        assert engine.submit(ALICE).running


def test_the_user_served_least_goes_first() -> None:
    engine = one_at_a_time()
    for _ in range(4):
        engine.submit(ALICE)
    for _ in range(2):
        engine.submit(BOB)
    engine.run()
    assert users(engine) == "ababaa"


def test_first_come_first_served_ignores_users() -> None:
    engine = one_at_a_time(policy="fcfs")
    for account in (ALICE, ALICE, ALICE, BOB):
        engine.submit(account)
        engine.clock.now += 1
    engine.run()
    assert users(engine) == "aaab"


def test_a_users_own_requests_keep_their_order() -> None:
    engine = one_at_a_time()
    tickets = [engine.submit(account) for account in (ALICE, BOB) * 5]
    engine.run()
    for account in (ALICE, BOB):
        assert [t for t in engine.order if t.user == account.user] == [t for t in tickets if t.user == account.user]


def test_credit_is_not_saved_up_while_away() -> None:
    engine = one_at_a_time()
    engine.submit(BOB)
    engine.run()  # bob has had a little and goes away
    for _ in range(20):
        engine.submit(ALICE)
    for _ in range(200):
        engine.step()
    for _ in range(6):
        engine.submit(BOB)
    engine.order.clear()
    engine.run()
    assert "bbb" not in users(engine)[:8]


@pytest.mark.parametrize("weight", [2.0, 3.0])
def test_service_under_backlog_follows_the_weights(weight: float) -> None:
    engine = SimulatedEngine(Capacity(tokens=600))
    heavy = Account("heavy", weight=weight)
    for _ in range(400):
        engine.submit(heavy)
        engine.submit(BOB)
    for _ in range(600):
        engine.step()
    ratio = engine.service["heavy"] * weight / engine.service["bob"]
    assert ratio == pytest.approx(weight, rel=0.1)


def test_interactive_goes_before_batch() -> None:
    engine = one_at_a_time()
    nightly = Account("nightly", priority="batch")
    engine.submit(ALICE)
    engine.submit(nightly)
    for _ in range(3):
        engine.submit(ALICE)
    engine.run()
    assert users(engine) == "aaaan"


def test_batch_is_not_starved() -> None:
    engine = one_at_a_time(ageing=5.0)
    engine.submit(ALICE)
    waiting = engine.submit(Account("nightly", priority="batch"))
    for _ in range(10):
        engine.submit(ALICE)
    while not waiting.running:
        engine.step()
        assert engine.clock.now < 5.0 + 20 * engine.step_s + 1


def test_the_tokens_in_flight_stay_near_the_cache() -> None:
    engine = SimulatedEngine(Capacity(tokens=1000, block=16))
    for _ in range(100):
        engine.submit(ALICE, prompt=50, most=50)
        engine.submit(BOB, prompt=50, most=50)
    while engine.running:
        engine.step()
        assert sum(t.prompt + t.generated for t in engine.running) <= 1000
    assert engine.scheduler.room.tokens == engine.scheduler.room.requests == 0


def test_short_replies_leave_room_for_more() -> None:
    engine = SimulatedEngine(Capacity(tokens=1000))
    for _ in range(60):
        engine.submit(ALICE, prompt=10, most=900, length=10)
    most = 0
    while engine.running:
        engine.step()
        most = max(most, len(engine.running))
    assert most > 10


def test_a_request_larger_than_the_cache_runs_alone() -> None:
    engine = SimulatedEngine(Capacity(tokens=100))
    assert engine.submit(ALICE, prompt=500).running
    assert not engine.submit(BOB).running


def test_a_share_is_kept_for_who_has_nothing_running() -> None:
    engine = SimulatedEngine(Capacity(requests=32))
    for _ in range(100):
        engine.submit(ALICE)
    assert len(engine.running) == 30
    assert engine.submit(BOB).running


def test_who_leaves_the_queue_is_forgotten() -> None:
    engine = one_at_a_time()
    engine.submit(ALICE)
    gone = engine.submit(BOB)
    last = engine.submit(ALICE)
    engine.scheduler.leave(gone)
    engine.run()
    assert gone not in engine.order
    assert last in engine.order
    assert engine.scheduler.queued_requests == engine.scheduler.queued_tokens == 0


def test_the_predicted_wait_is_near_the_real_one() -> None:
    engine = SimulatedEngine(Capacity(requests=4))
    for _ in range(60):
        engine.submit(ALICE)
    for _ in range(60):
        engine.step()
    predicted = engine.scheduler.predicted_wait(ALICE)
    before = engine.clock.now
    last = engine.submit(ALICE)
    while not last.running:
        engine.step()
    assert predicted == pytest.approx(engine.clock.now - before, rel=0.25)
    assert engine.scheduler.predicted_wait(BOB) == 0.0


def test_a_newcomers_predicted_wait_does_not_count_anothers_backlog() -> None:
    engine = SimulatedEngine(Capacity(requests=4))
    for _ in range(200):
        engine.submit(ALICE)
    for _ in range(60):
        engine.step()
    assert engine.scheduler.predicted_wait(BOB) < 0.1 * engine.scheduler.predicted_wait(ALICE)
    assert engine.scheduler.predicted_wait(Account("n", priority="batch")) > engine.scheduler.predicted_wait(BOB)


@settings(max_examples=40, deadline=None)
@given(
    loads=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=2, max_size=8),
    tokens=st.integers(100, 600),
)
def test_backlogged_users_stay_within_the_papers_bound(loads: list[tuple[int, int]], tokens: int) -> None:
    """Theorem 4.4: the accumulated service of two backlogged users differs by at most 2 max(w_p L_in, w_q M).

    M is what the engine holds at once: more than its cache where lengths were guessed too low.
    """
    engine = SimulatedEngine(Capacity(tokens=tokens))
    for _ in range(100):
        for number, (prompt, most) in enumerate(loads):
            engine.submit(Account(f"u{number}"), prompt=prompt, most=most)
    held = tokens
    leads = []  # of each user over the first, after each step
    while all(user["queued"] for user in engine.scheduler.snapshot()["users"].values()):
        engine.step()
        held = max(held, engine.scheduler.room.tokens)
        leads.append([engine.service[f"u{number}"] - engine.service["u0"] for number in range(len(loads))])
    bound = 2 * max(*(prompt for prompt, _ in loads), 2 * held)
    for lead in zip(*leads, strict=True):  # the gap over any interval is how far a lead moved in it
        assert max(lead) - min(lead) <= bound
