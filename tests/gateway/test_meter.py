"""What is counted of a request, from the deltas that the engine yields."""

import asyncio

import pytest

from synthia_vllm.engine.port import Delta, Engine
from synthia_vllm.errors import RequestError, UpstreamLost
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.request import Request, Usage
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import Held, Saying, collect, collecting, make_request, settle, tokens


class Clock:
    """Each look at it takes a second."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


async def metered(engine: Engine, request: Request) -> Usage:
    await collect(Sequences(Meter(engine, clock=Clock())), request)
    return request.usage


def billed(usage: Usage) -> tuple[int, int]:
    return usage.billed_prompt, usage.billed_generated


async def test_tokens_are_counted_by_their_ids_and_pass_unchanged() -> None:
    deltas = [Delta((1, 2, 3), "abc", cached=4), Delta((), "d"), Delta((4,), "e", "stop")]
    request = make_request(prompt=7)
    assert await collect(Sequences(Meter(Saying(*deltas))), request) == deltas
    usage = request.usage
    assert (usage.prompt, usage.cached, usage.generated, usage.completed) == (7, 4, 4, True)
    assert billed(usage) == (7, 4)


async def test_the_moments_of_its_life_are_noted_once_each() -> None:
    usage = await metered(Saying(Delta(note="waiting"), *tokens("a", "b", "c")), make_request())
    assert (usage.dispatched, usage.first_token, usage.last_token) == (1.0, 2.0, 4.0)


async def test_what_the_engine_refuses_costs_nothing() -> None:
    request = make_request(prompt=100)
    with pytest.raises(RequestError):
        await metered(Saying(Delta(note="waiting"), RequestError("no")), request)
    assert billed(request.usage) == (0, 0)


async def test_what_breaks_in_its_middle_costs_what_was_generated() -> None:
    request = make_request(prompt=100)
    with pytest.raises(UpstreamLost):
        await metered(Saying(*tokens("a", "b")[:1], UpstreamLost("gone")), request)
    assert billed(request.usage) == (100, 1)
    assert not request.usage.completed


async def test_who_leaves_while_the_prompt_is_read_pays_for_the_prompt() -> None:
    request = make_request(prompt=100)
    (task,) = collecting(Sequences(Meter(Held())), [request])
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert billed(request.usage) == (100, 0)


async def test_it_is_counted_as_it_grows() -> None:
    request = make_request()
    seen = [request.usage.generated async for _ in Meter(Saying(*tokens("a", "b", "c"))).generate(request)]
    assert seen == [1, 2, 3]


async def test_several_sequences_are_summed_and_whole_when_all_have_ended() -> None:
    request = make_request(prompts=2, replies=2, prompt=5)
    usage = request.usage
    layer = Sequences(Meter(Saying(*tokens("a", "b", "c"))))
    seen = [(usage.generated, usage.completed) async for _ in layer.generate(request)]
    assert not seen[0][1]
    assert seen[-1] == (12, True)
    assert billed(usage) == (10, 12)


async def test_the_cached_part_of_a_prompt_counts_once_however_many_replies_it_gets() -> None:
    first = [Delta((1,), "a", "stop", cached=3)]
    usage = await metered(Saying(*first), make_request(prompts=2, replies=4, prompt=5))
    assert (usage.cached, usage.prompt) == (6, 10)


async def test_the_engines_own_count_takes_the_place_of_an_estimate() -> None:
    request = make_request(prompt=100, prompts=2, replies=2, exact=False)
    usage = await metered(Saying(Delta((1,), "a", "stop", prompt_tokens=9)), request)
    assert usage.prompt == 18


async def test_a_count_that_is_told_for_some_prompts_only_is_none() -> None:
    request = make_request(prompt=100, prompts=2, exact=False)
    first = Meter(Saying(Delta((1,), "a", "stop", prompt_tokens=9)))
    assert [delta async for delta in first.generate(request)]
    assert request.usage.prompt == 200
