import asyncio
from dataclasses import replace
from functools import partial

import pytest

from synthia_vllm.engine.port import Capacity
from synthia_vllm.errors import Overloaded, QueueTimeout, UpstreamLost
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import Held, Saying, collect, collecting, make_request, settle, tokens


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
def layer(engine: Held) -> FairQueue:
    return FairQueue(Sequences(Meter(engine)), scheduler=Scheduler(Capacity(requests=1)), max_wait=30.0, max_requests=2)


async def test_a_turn_comes_when_the_engine_has_room(layer: FairQueue, engine: Held) -> None:
    tasks = collecting(layer, [make_request(id="a"), make_request(id="b")])
    await settle()
    assert engine.entered == ["a-0"]
    engine.release.set()
    await asyncio.gather(*tasks)
    assert engine.entered == ["a-0", "b-0"]
    assert layer.scheduler.room.requests == 0


async def test_room_is_free_when_the_engine_is_done_whether_the_reply_was_taken_or_not(layer: FairQueue) -> None:
    layer.engine = Sequences(Meter(Saying(*tokens("a", "b"))))
    deltas = layer.generate(make_request(most=2))
    assert (await anext(deltas)).finish is None
    assert layer.scheduler.room.requests == 1
    assert (await anext(deltas)).finish == "stop"
    with pytest.raises(StopAsyncIteration):
        await anext(deltas)
    assert layer.scheduler.room.requests == 0


async def test_a_client_that_leaves_while_queued_is_removed_at_once(layer: FairQueue) -> None:
    one = make_request(id="b")
    running, waiting = collecting(layer, [make_request(id="a"), one])
    await settle()
    assert layer.scheduler.queued_requests == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert layer.scheduler.queued_requests == 0
    assert one.usage.dispatched is None
    running.cancel()


async def test_who_waited_too_long_is_dropped_before_any_prefill(layer: FairQueue, engine: Held) -> None:
    (running,) = collecting(layer, [make_request(id="a")])
    await settle()
    with pytest.raises(QueueTimeout) as caught:
        await collect(layer, make_request(id="late", queue_timeout=0.05))
    assert caught.value.status == 503
    assert dict(caught.value.headers)[b"retry-after"]
    assert engine.entered == ["a-0"]
    assert layer.scheduler.queued_requests == 0
    running.cancel()


async def test_a_full_queue_refuses(layer: FairQueue) -> None:
    tasks = collecting(layer, [make_request(id=id) for id in "abc"])
    await settle()
    with pytest.raises(Overloaded, match="full"):
        await collect(layer, make_request())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert layer.scheduler.queued_requests == layer.scheduler.room.requests == 0


async def test_a_wait_longer_than_allowed_is_refused_at_once(layer: FairQueue) -> None:
    tasks = collecting(layer, [make_request(), make_request(most=1000)])
    await settle()
    layer.scheduler.rate.per_second = 20.0  # cost a second: a hundred seconds of queue
    with pytest.raises(Overloaded) as caught:
        await collect(layer, make_request(id="refused"))
    assert 60 < caught.value.retry_after < 80
    for task in tasks:
        task.cancel()


async def test_a_cancelled_request_gives_its_room_back(layer: FairQueue) -> None:
    (running,) = collecting(layer, [make_request()])
    await settle()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert layer.scheduler.room.requests == 0


async def test_tokens_are_charged_as_they_come(layer: FairQueue) -> None:
    layer.engine = Sequences(Meter(Saying(*tokens("a", "b", "c"))))
    service = partial(layer.scheduler.counters.service.get, "alice")
    charged = [service() async for _ in layer.generate(make_request(most=10))]
    assert charged == [1 + 2, 1 + 4, 1 + 6]


async def test_what_was_generated_and_not_taken_is_charged_too(layer: FairQueue) -> None:
    layer.scheduler.room.capacity = Capacity(requests=32)
    (other,) = collecting(layer, [make_request(id="other")])  # or else the user's counter would be forgotten
    await settle()
    layer.engine = Sequences(Meter(Saying(*tokens("a", "b", "c"))))
    request = make_request(most=10)
    deltas = layer.generate(request)
    await anext(deltas)
    request.usage.generated += 4
    before = layer.scheduler.counters.service["alice"]
    await deltas.aclose()
    assert layer.scheduler.counters.service["alice"] - before == 2 * 4
    other.cancel()


async def test_one_users_queue_does_not_make_another_wait(layer: FairQueue, engine: Held) -> None:
    tasks = collecting(layer, [make_request(id="a"), make_request(id="b"), make_request("bob", id="c")])
    await settle()
    engine.release.set()
    await asyncio.gather(*tasks)
    assert engine.entered[1] == "c-0"  # bob's, though it came last


async def test_who_has_most_in_a_full_queue_loses_his_newest_with_a_clean_503(layer: FairQueue, engine: Held) -> None:
    first, older, newest = collecting(layer, [make_request(id=id) for id in "abc"])
    await settle()
    bob = asyncio.ensure_future(collect(layer, make_request("bob", id="bob")))
    await settle()
    with pytest.raises(Overloaded, match="full") as caught:
        await newest
    assert caught.value.status == 503
    assert dict(caught.value.headers)[b"retry-after"]
    engine.release.set()
    await asyncio.gather(first, older, bob)
    assert engine.entered == ["a-0", "bob-0", "b-0"]
    assert layer.scheduler.queued_requests == layer.scheduler.queued_tokens == layer.scheduler.room.requests == 0


async def test_the_usual_length_is_learned_from_who_leaves_and_not_from_an_engine_that_breaks(layer: FairQueue) -> None:
    layer.engine = Sequences(Meter(Saying(*tokens("a", "b", "c"))))
    leaving = layer.generate(make_request(most=900))
    await anext(leaving)
    await leaving.aclose()
    assert layer.scheduler.room.expected_generated("alice", 900) == 1
    layer.engine = Sequences(Meter(Saying(*tokens("a", "b", "c")[:2], UpstreamLost("gone"))))
    with pytest.raises(UpstreamLost):
        await collect(layer, make_request("bob", most=900))
    assert layer.scheduler.room.expected_generated("bob", 900) == 1  # what is known of the others


async def test_who_has_had_his_turn_at_another_gateway_goes_on_at_once() -> None:
    engine = Held()
    scheduler = Scheduler(Capacity(requests=1))
    queue = FairQueue(engine, scheduler=scheduler)
    first, waiting = make_request("alice", id="1"), make_request("bob", id="2")
    resumed = replace(make_request("carol", id="3"), keeps_its_place=True)
    running = collecting(queue, [first, waiting, resumed])
    await settle()
    assert engine.entered == ["1", "3"]
    assert (scheduler.room.requests, scheduler.queued_requests) == (2, 1)
    engine.release.set()
    await asyncio.gather(*running)
    assert len(engine.entered) == 3
    assert (scheduler.room.requests, scheduler.room.tokens, scheduler.queued_requests) == (0, 0, 0)
