"""Several sequences of one request run as one."""

import asyncio
from collections import Counter

import pytest

from benchmarks.null_port import NullEnginePort
from synthia_vllm.errors import UpstreamLost
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import collect, collecting, make_request, until


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
