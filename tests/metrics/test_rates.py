import random

import pytest

from synthia_vllm.metrics.rates import TokenRates


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def rate(rates: TokenRates) -> float:
    return sum(generation for _, _, generation in rates.rates())


def test_a_steady_minute_is_told_within_3_percent_at_any_moment(clock: Clock) -> None:
    """64 streams of 8.3 tokens/s, the ticks late at random as on a busy machine."""
    dice, rates = random.Random(3), TokenRates(clock)
    tokens = rates.tokens("m", "r")
    next_tick = clock.now + 1
    told = []
    for step in range(int(60 * 64 * 8.3)):
        clock.now += 1 / (64 * 8.3) * dice.uniform(0.5, 1.5)
        tokens.generation += 1
        if clock.now >= next_tick:
            next_tick += 1 + dice.uniform(-0.05, 0.05)
            rates.tick()
        if clock.now > 1012 and step % 7 == 0:
            told.append(rate(rates))
    assert len(told) > 100
    assert all(value == pytest.approx(64 * 8.3, rel=0.03) for value in told)


def test_after_ten_seconds_of_silence_it_is_zero(clock: Clock) -> None:
    rates = TokenRates(clock)
    rates.tokens("m", "r").generation += 100
    for _ in range(9):
        clock.now += 1
        rates.tick()
    assert rate(rates) > 0
    for _ in range(3):
        clock.now += 1
        rates.tick()
    assert rate(rates) == 0


def test_it_is_told_for_each_replica(clock: Clock) -> None:
    rates = TokenRates(clock)
    for _ in range(15):
        rates.tokens("m", "a").generation += 5
        rates.tokens("m", "b").prompt += 7
        clock.now += 1
        rates.tick()
    assert {(replica, prompt, generation) for (_, replica), prompt, generation in rates.rates()} == {
        ("a", 0.0, 5.0),
        ("b", 7.0, 0.0),
    }


def test_a_replica_that_is_gone_is_forgotten(clock: Clock) -> None:
    rates = TokenRates(clock)
    rates.tokens("m", "a").generation += 5
    for _ in range(1000):
        clock.now += 1
        rates.tick()
    assert not rates.totals


def test_totals_from_elsewhere_make_no_rate_at_first_sight(clock: Clock) -> None:
    rates = TokenRates(clock)
    rates.set("m", "a", 1e6, 1e6)
    clock.now += 2
    assert rate(rates) == 0
    rates.set("m", "a", 1e6, 1e6 + 10)
    assert rate(rates) == 5
