"""Hundreds of users of all kinds around the real scheduler, in virtual time, against what is promised to each."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from tests.gateway.fair.crowd import Asked, Crowd, Kind

TOKENS, PROMPT, SECONDS = 6000, 60, 100.0

# How somebody behaves, apart from who he is.
BEHAVIOURS = st.one_of(
    st.builds(dict, every=st.floats(0.5, 5.0), most=st.integers(5, 40)),  # steady
    st.builds(dict, streams=st.integers(1, 4), most=st.integers(10, 80), pause=st.floats(0.0, 20.0)),
    st.builds(dict, streams=st.integers(5, 30), most=st.integers(10, 80), pause=st.floats(20.0, 60.0)),  # in bursts
    st.builds(dict, streams=st.integers(1, 4), most=st.integers(20, 200), length=st.integers(5, 200)),
    st.builds(dict, streams=st.integers(1, 4), most=st.just(TOKENS - PROMPT), leaves=st.floats(0.2, 8.0)),
    st.builds(dict, streams=st.integers(1, 2), most=st.integers(100_000, 4_000_000), length=st.integers(5, 40)),
)


@st.composite
def crowds(draw: st.DrawFn) -> list[Kind]:
    """Two hundred users or so, a few of whom always have more waiting than they get."""
    behaviours = draw(st.lists(BEHAVIOURS, min_size=5, max_size=12))
    weights = draw(st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0]), min_size=3, max_size=3))
    prompts = st.integers(1, PROMPT)
    kinds = [
        Kind(
            Account(f"u{number}", weight=weights[number % 3], priority="batch" if number % 10 == 9 else "interactive"),
            prompt=draw(prompts) if number < 20 else 1 + number % PROMPT,
            begins=float(number % 7),
            **behaviours[number % len(behaviours)],
        )
        for number in range(draw(st.integers(100, 250)))
    ]
    for number in range(4):
        flood = Account(f"flood{number}", priority="batch" if number > 1 else "interactive")
        kinds.append(Kind(flood, streams=draw(st.integers(60, 120)), prompt=PROMPT, most=40))
    return kinds


class Watched(Crowd):
    """Notes what users are promised at every step."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        super().__init__(Capacity(tokens=TOKENS), kinds, max_requests=400, max_tokens=2_000_000)
        self.leads: list[float] = []  # in service, of one flood over the other of its class
        self.broken: list[Asked] = []  # refused while another held more of what was short

    def step(self) -> None:
        super().step()
        self.leads.append(self.service["flood0"] - self.service["flood1"])

    def _refused(self, one: Asked) -> None:
        waiting = [ticket for ticket in self._of if ticket.waiting]
        requests, tokens = len(waiting) - self.max_requests, sum(t.tokens for t in waiting) - self.max_tokens
        places, sizes = Counter[str](), Counter[str]()
        for ticket in waiting:
            places[ticket.user] += 1
            sizes[ticket.user] += ticket.tokens
        weights = {ticket.user: ticket.weight for ticket in waiting}
        user = one.kind.account.user

        def others_could(held: Counter[str], over: int) -> bool:
            more = [other for other in held if held[other] / weights[other] > held[user] / weights[user]]
            return sum(held[other] for other in more) >= over

        # Those with more may hold too little, in all, to make room for one of a greater weight; where both are short,
        # places are found first, and who holds most of these may hold little of the other.
        short = [(held, over) for held, over in ((places, requests), (sizes, tokens)) if over > 0]
        if all(others_could(held, over) for held, over in short or [(places, 0)]):
            self.broken.append(one)


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
@given(kinds=crowds())
def test_what_is_promised_holds_for_all_in_a_crowd(kinds: list[Kind]) -> None:
    crowd = Watched(kinds)
    crowd.run_until(SECONDS)
    scheduler = crowd.scheduler
    # Theorem 4.4, for two who always have requests waiting.
    steady = crowd.leads[300:]
    assert max(steady) - min(steady) <= 2 * max(1.0 * PROMPT, 2.0 * TOKENS)
    assert not crowd.broken
    # No class starves. Of batch, only what has aged has a share beside others, and some leave before.
    of_batch = sum(crowd.service[kind.account.user] for kind in kinds if kind.account.priority == "batch")
    assert 0.01 <= of_batch / sum(crowd.service.values()) <= 0.95
    waiting = [ticket for ticket in crowd._of if ticket.waiting]
    assert scheduler.queued_requests == len(waiting) <= 400
    assert scheduler.queued_tokens == sum(ticket.tokens for ticket in waiting)
    assert scheduler.room.tokens == sum(ticket.held for ticket in crowd.running)
    assert scheduler.room.requests == len(crowd.running)


@pytest.mark.xfail(reason="in a crowd that changes by the second, predicted waits are off by half in the median")
@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
@given(kinds=crowds())
def test_the_predicted_wait_is_near_the_real_one_in_a_crowd(kinds: list[Kind]) -> None:
    crowd = Watched(kinds)
    crowd.run_until(SECONDS)
    longer = [one for one in crowd.asked if one.started is not None and one.waited >= 2.0 and one.joined > 20]
    assert median(abs(one.predicted - one.waited) / one.waited for one in longer) <= 0.3
