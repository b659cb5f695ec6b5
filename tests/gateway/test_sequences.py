"""Several sequences of one request run as one."""

import asyncio
from collections import Counter

import pytest

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.errors import RequestError, UpstreamLost
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import collect, collecting, make_request, settle, until


async def test_one_sequence_is_the_engines_own() -> None:
    deltas = await collect(Sequences(Meter(NullEnginePort())), make_request(most=5))
    assert [len(delta.ids) for delta in deltas] == [1] * 5
    assert {delta.sequence for delta in deltas} == {0}


async def test_several_run_together_and_each_delta_tells_whose_it_is() -> None:
    engine = NullEnginePort(tokens_per_second=100)
    deltas = await collect(Sequences(Meter(engine)), make_request(most=5, prompts=2, replies=3))
    assert Counter(delta.sequence for delta in deltas) == dict.fromkeys(range(6), 5)
    assert len({delta.sequence for delta in deltas[:6]}) == 6  # none waits for another
    texts = ["".join(delta.text for delta in deltas if delta.sequence == number) for number in range(6)]
    assert len(set(texts)) == 2  # by prompt
    assert texts[0] == texts[2]
    assert texts[3] == texts[5]


async def test_an_error_of_one_ends_all() -> None:
    engine = NullEnginePort(tokens_per_second=100)
    (task,) = collecting(Sequences(Meter(engine)), [make_request(most=1000, prompts=4)])
    await until(lambda: engine.generated > 0)
    engine.faults.change({"dead": True})
    with pytest.raises(UpstreamLost):
        await task
    assert engine.running == engine.waiting == 0


async def test_leaving_ends_all() -> None:
    engine = NullEnginePort(tokens_per_second=100, max_num_seqs=3)
    (task,) = collecting(Sequences(Meter(engine)), [make_request(most=1000, prompts=5)])
    await until(lambda: engine.running == 3)
    assert (engine.running, engine.waiting) == (3, 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (engine.running, engine.waiting, engine.aborted) == (0, 0, 5)


async def test_what_the_engine_generated_is_counted_also_where_nobody_took_it_any_more() -> None:
    engine = NullEnginePort()
    request = make_request(most=1000, prompts=5)
    deltas = Sequences(Meter(engine)).generate(request)
    for _ in range(7):
        await anext(deltas)
    await deltas.aclose()
    assert request.usage.generated == engine.generated


async def test_many_are_begun_in_their_order_while_others_have_their_turn() -> None:
    engine = NullEnginePort(tokens_per_second=100)
    (task,) = collecting(Sequences(Meter(engine)), [make_request(most=2, prompts=100)])
    most = 0
    while len(engine.seen) < 100:
        before = len(engine.seen)
        await asyncio.sleep(0)
        most = max(most, len(engine.seen) - before)
    assert most < 50
    assert [generation.id for generation in engine.seen] == [f"1-{number}" for number in range(100)]
    assert Counter(delta.sequence for delta in await task) == dict.fromkeys(range(100), 2)


async def test_many_deltas_at_once_let_others_have_their_turn() -> None:
    request = make_request(most=60, prompts=50)
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    task = asyncio.create_task(other())
    deltas = await collect(Sequences(Meter(NullEnginePort())), request)
    task.cancel()
    assert len(deltas) == request.usage.generated == 3000
    assert request.usage.completed
    assert others > 15


async def test_an_error_before_all_have_begun_begins_no_more() -> None:
    engine = NullEnginePort(error=RequestError("too long"))
    request = make_request(prompts=1000)
    with pytest.raises(RequestError):
        await collect(Sequences(Meter(engine)), request)
    assert len(engine.seen) < 100
    assert engine.running == engine.waiting == 0
    assert request.usage.billed_prompt == request.usage.billed_generated == 0


async def test_leaving_before_all_have_begun_leaves_none_in_the_engine() -> None:
    engine = NullEnginePort(tokens_per_second=100)
    (task,) = collecting(Sequences(Meter(engine)), [make_request(prompts=1000)])
    while not engine.running:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await settle()
    assert engine.running == engine.waiting == 0
    assert engine.aborted == len(engine.seen) < 100


async def test_a_second_cancellation_while_many_are_left_leaves_none_behind() -> None:
    engine = NullEnginePort(tokens_per_second=1)
    (task,) = collecting(Sequences(Meter(engine)), [make_request(prompts=200)])
    await until(lambda: engine.running == 200)
    task.cancel()
    while not engine.aborted:
        await asyncio.sleep(0)
    assert engine.running
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await settle()
    assert (engine.running, engine.waiting, engine.aborted) == (0, 0, 200)
