"""The stand-in behind the engine port behaves as the port says engines do."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.null.tokens import EOS, expected, prompt_ids
from synthia_vllm.engine.port import Delta, Engine, Generation, Sampling
from synthia_vllm.errors import Overloaded, RequestError, UpstreamLost, UpstreamTimeout

PROMPT = "What is an orca?"


def generation(prompt: str = PROMPT, *, max_tokens: int = 8, **sampling: Any) -> Generation:
    return Generation(id=prompt, prompt=prompt_ids(prompt), sampling=Sampling(max_tokens=max_tokens, **sampling))


async def reply(engine: Engine, *given: Any, **sampling: Any) -> list[Delta]:
    return [delta async for delta in engine.generate(generation(*given, **sampling))]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.ids]


async def test_a_reply_is_its_prompts_and_the_tokenizer_makes_the_same_text_of_its_ids() -> None:
    engine = NullEnginePort(cached=3)
    deltas = await reply(engine)
    assert [delta.text for delta in deltas] == expected({"prompt": PROMPT}, 8)
    assert null_tokenizer().decode(ids(deltas)) == text(deltas)
    assert [delta.finish for delta in deltas] == [None] * 7 + ["length"]
    assert [delta.cached for delta in deltas] == [3] + [None] * 7
    assert (engine.generated, engine.prompt_tokens, engine.finished) == (8, 1 + len(PROMPT), 1)
    assert engine.seen[0].id == PROMPT


async def test_who_is_sent_text_counts_its_tokens() -> None:
    engine = NullEnginePort(tokenizer=None)
    asked = Generation(id="1", prompt=(), text=PROMPT, sampling=Sampling(max_tokens=2))
    deltas = [delta async for delta in engine.generate(asked)]
    assert text(deltas) == "".join(expected({"prompt": PROMPT}, 2))
    assert deltas[0].prompt_tokens == 1 + len(PROMPT)


async def test_the_context_bounds_prompt_and_reply() -> None:
    engine = NullEnginePort(context=20)
    assert len(await reply(engine)) == 20 - 1 - len(PROMPT)
    with pytest.raises(RequestError, match="no room"):
        await reply(engine, "a prompt of its whole context")


async def test_a_stop_string_ends_it_and_is_the_texts_end() -> None:
    engine = NullEnginePort()
    whole = text(await reply(engine))
    stop = whole[7:12]
    deltas = await reply(engine, stop=("no", stop))
    assert text(deltas) == whole[:12]
    assert (deltas[-1].finish, deltas[-1].stop_reason, len(ids(deltas))) == ("stop", stop, 3)


async def test_min_tokens_and_stop_tokens() -> None:
    engine = NullEnginePort()
    tokens = ids(await reply(engine))
    last = (await reply(engine, stop_token_ids=(tokens[2],)))[-1]
    assert (last.ids, last.finish, last.stop_reason) == ((tokens[2],), "stop", tokens[2])
    assert len(await reply(engine, stop_token_ids=(tokens[2],), min_tokens=5)) == 8


async def test_it_says_a_text_with_its_characters_whole_and_ends() -> None:
    engine = NullEnginePort(text="Hi 😀!\nUSER: you")
    deltas = await reply(engine, max_tokens=100)
    assert text(deltas) == engine.text
    assert [delta.text for delta in deltas[3:7]] == ["", "", "", "😀"]
    assert (deltas[-1].ids, deltas[-1].text, deltas[-1].finish) == ((EOS,), "", "stop")
    stopped = await reply(engine, max_tokens=100, stop=("\nUSER:",))
    assert text(stopped) == "Hi 😀!\nUSER:"
    assert stopped[-1].stop_reason == "\nUSER:"
    assert len(await reply(engine, max_tokens=100, ignore_eos=True)) == 100


async def test_replies_end_of_themselves_where_they_are_told_to() -> None:
    engine = NullEnginePort(reply_tokens=5)
    assert [(await reply(engine, max_tokens=most))[-1].finish for most in (5, 6)] == ["length", "stop"]
    assert len(await reply(engine, max_tokens=9, min_tokens=7)) == 8


async def test_logprobs_are_one_an_id() -> None:
    engine = NullEnginePort()
    deltas = await reply(engine, logprobs=2, prompt_logprobs=0)
    positions = [position for delta in deltas for position in delta.logprobs or ()]
    assert [position.chosen.id for position in positions] == ids(deltas)
    assert all([top.rank for top in position.top] == [1, 2] for position in positions)
    told = deltas[0].prompt_logprobs
    assert told is not None
    assert told[0] is None
    assert len(told) == 1 + len(PROMPT)
    assert [position.chosen.text for position in told[1:4] if position] == ["W", "h", "a"]


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RequestError), (500, UpstreamLost), (502, UpstreamLost), (503, Overloaded), (504, UpstreamTimeout)],
)
async def test_errors_come_before_the_first_delta(status: int, error: type[Exception]) -> None:
    engine = NullEnginePort(faults=Faults(status=status))
    with pytest.raises(error):
        await reply(engine)
    assert (engine.failed, engine.generated, engine.running, engine.waiting) == (1, 0, 0, 0)


async def test_an_error_of_the_callers_choice() -> None:
    engine = NullEnginePort(error=RequestError("no such grammar", param="structured_outputs"))
    with pytest.raises(RequestError, match="no such grammar"):
        await reply(engine)
    engine.error = None
    assert len(await reply(engine)) == 8


async def test_a_reply_breaks_in_its_middle() -> None:
    engine = NullEnginePort(faults=Faults(break_after=4))
    deltas = engine.generate(generation())
    assert [(await anext(deltas)).finish for _ in range(3)] == [None] * 3
    with pytest.raises(UpstreamLost):
        await anext(deltas)
    assert engine.generated == 3
    assert (engine.failed, engine.aborted, engine.running) == (1, 0, 0)
    engine.faults.change({"break_after": None, "end_after": 4})
    assert [delta.finish for delta in await reply(engine)] == [None] * 3


async def test_a_dead_engine_loses_those_under_way() -> None:
    engine = NullEnginePort(tokens_per_second=200)
    running = asyncio.create_task(reply(engine, max_tokens=1000))
    while not engine.generated:
        await asyncio.sleep(0.001)
    engine.faults.change({"dead": True})
    with pytest.raises(UpstreamLost):
        await running
    assert not await engine.ready()
    with pytest.raises(UpstreamLost):
        await engine.models()


async def test_a_hung_engine_goes_on_when_it_is_let() -> None:
    engine = NullEnginePort(faults=Faults(hang=True))
    running = asyncio.create_task(reply(engine))
    done, _ = await asyncio.wait((running,), timeout=0.1)
    assert not done
    engine.faults.change({"hang": False})
    assert len(await running) == 8


async def test_those_without_a_slot_wait_in_order() -> None:
    engine = NullEnginePort(max_num_seqs=2, tokens_per_second=200)
    ended = []

    async def one(number: int) -> None:
        await reply(engine, f"{number}")
        ended.append(number)

    running = [asyncio.create_task(one(number)) for number in range(6)]
    while not engine.running:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert (engine.running, engine.waiting) == (2, 4)
    running[2].cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert ended == [0, 1, 3, 4, 5]
    assert (engine.running, engine.waiting, engine.finished, engine.aborted) == (0, 0, 5, 1)


async def test_who_leaves_ends_its_sequence_at_once() -> None:
    engine = NullEnginePort()
    async with aclosing(engine.generate(generation(max_tokens=1000))) as deltas:
        async for _ in deltas:
            break
    assert (engine.aborted, engine.running, engine.generated) == (1, 0, 1)


async def test_all_sequences_share_the_moments_of_their_tokens() -> None:
    engine = NullEnginePort(tokens_per_second=20, prefill_s=0.03)
    loop = asyncio.get_running_loop()

    async def times(wait: float) -> list[float]:
        await asyncio.sleep(wait)
        return [loop.time() async for _ in engine.generate(generation(max_tokens=4))]

    one, other = await asyncio.gather(times(0.0), times(0.02))
    shared = {round(at * 20) for at in one} & {round(at * 20) for at in other}
    assert len(shared) >= 3
    assert one[-1] - one[0] > 0.12


async def test_at_full_speed_others_get_their_turn() -> None:
    engine = NullEnginePort(context=None)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert len(await reply(engine, max_tokens=64 * 20)) == 64 * 20
    task.cancel()
    assert turns >= 20
