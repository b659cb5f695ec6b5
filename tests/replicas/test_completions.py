"""Any engine over `/v1/completions`: what it is asked, and what it may answer."""

import json
from typing import Any

import pytest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.bench.null.tokenizer import backend
from synthia_vllm.bench.null.tokens import BOS, SPECIAL, prompt_ids
from synthia_vllm.engine.port import Delta
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import RequestError, UpstreamLost
from synthia_vllm.settings import PromptSettings
from tests.gateway.asgi import post
from tests.gateway.stack import Stack
from tests.gateway.whole import BODIES, CHAT, COMPLETIONS
from tests.replicas.engines import Answers, Live, asking, count_of, event, pool_of, read, reply_to, streaming, text_of

DONE = b"data: [DONE]\n\n"
STOP = {"text": "", "finish_reason": "stop"}


async def ask(live: Live, answer: ASGIApp, **sampling: Any) -> tuple[list[Delta], dict[str, Any]]:
    engine = Answers(answer)
    async with pool_of(live(engine)) as pool:
        deltas = await read(pool, asking(**sampling))
    return deltas, engine.seen[-1]


async def test_only_what_differs_from_the_default_is_sent(live: Live) -> None:
    _, asked = await ask(live, streaming(event(STOP), DONE))
    assert asked == {
        "model": "other", "prompt": "hi", "max_tokens": 12, "temperature": 1.0, "top_p": 1.0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_what_other_engines_know_under_another_name_is_translated(live: Live) -> None:
    schema = {"type": "object"}
    _, asked = await ask(
        live, streaming(event(STOP)), structured_outputs={"json": schema}, stop=("x",), top_k=5, seed=3, logprobs=2
    )
    assert asked["response_format"] == {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    assert (asked["stop"], asked["top_k"], asked["seed"], asked["logprobs"]) == (["x"], 5, 3, 2)
    assert "structured_outputs" not in asked


async def test_the_asked_name_goes_on_where_the_engine_knows_it(live: Live) -> None:
    engine = Answers(streaming(event(STOP)))
    async with pool_of(live(engine), tokenizer=False) as pool:
        for name in ("other", "synthia", ""):
            await read(pool, asking(ids=False, model=name))
    assert [one["model"] for one in engine.seen] == ["other"] * 3


async def test_tokens_are_counted_as_the_engine_counts_them(live: Live) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    deltas, _ = await ask(
        live,
        streaming(
            event({"text": "two words"}), event({"text": " more", **STOP | {"text": " more"}}), event(usage=usage), DONE
        ),
    )
    assert (text_of(deltas), count_of(deltas)) == ("two words more", 5)
    assert (deltas[-1].finish, deltas[-1].cached) == ("stop", 4)
    assert {token for delta in deltas for token in delta.ids} == {-1}


async def test_a_count_that_cannot_be_true_is_bounded(live: Live) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 10**12}
    deltas, _ = await ask(live, streaming(event({"text": "a", "finish_reason": "stop"}, usage=usage), DONE))
    assert count_of(deltas) == 12


async def test_a_stop_string_ends_it_even_if_the_engine_goes_on(live: Live) -> None:
    deltas, _ = await ask(
        live, streaming(event({"text": "a US"}), event({"text": "ER: b"}), event(STOP)), stop=("USER:",)
    )
    assert text_of(deltas) == "a USER:"
    assert (deltas[-1].finish, deltas[-1].stop_reason) == ("stop", "USER:")


async def test_logprobs_are_named_by_text(live: Live) -> None:
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -0.25, "a": -0.5}]}
    deltas, _ = await ask(
        live, streaming(event({"text": "a", "finish_reason": "stop", "logprobs": logprobs})), logprobs=2
    )
    (place,) = deltas[-1].logprobs or ()
    assert (place.chosen.text, place.chosen.logprob) == ("a", -0.5)
    assert [one.text for one in place.top] == ["a", "b"]


@pytest.mark.parametrize("form", ["crlf", "split", "ids"])
async def test_streams_are_read_however_they_are_written(live: Live, form: Any) -> None:
    engine = NullEngine(generate_route=False, numbered=True, faults=Faults(sse=form))
    async with pool_of(live(engine), tokenizer=False) as pool:
        deltas = await read(pool, asking(ids=False))
    assert (text_of(deltas), count_of(deltas), deltas[-1].finish) == (reply_to(), 12, "length")


async def test_chunks_without_choices_are_read_over(live: Live) -> None:
    nothing = b'data: {"choices": null}\n\ndata: {}\n\ndata: \n\n: comment\n\n'
    deltas, _ = await ask(live, streaming(nothing, event({"text": "a"}), nothing, event(STOP), DONE))
    assert (text_of(deltas), deltas[-1].finish) == ("a", "stop")


async def test_a_whole_reply_where_a_stream_was_asked_for_is_taken(live: Live) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 3}
    whole = {"choices": [{"text": "all of it", "finish_reason": "length"}], "usage": usage}
    deltas, _ = await ask(live, JSONResponse(whole))
    assert (text_of(deltas), count_of(deltas), deltas[-1].finish) == ("all of it", 3, "length")


BROKEN: dict[str, ASGIApp] = {
    "a page": HTMLResponse("<html>Sign in</html>"),
    "nothing": Response(b"", media_type="text/event-stream"),
    "no end": streaming(event({"text": "a"})),
    "no end but [DONE]": streaming(event({"text": "a"}), DONE),
    "no JSON": streaming(b"data: {nothing}\n\n"),
    "a list": streaming(b"data: []\n\n"),
    "deep": streaming(b'data: {"error": ' + b"[" * 5000 + b"]" * 5000 + b"}\n\n"),
    "numbers for texts": streaming(b'data: {"choices": [{"text": 5}]}\n\n'),
    "no UTF-8": streaming(b'data: {"choices": [{"text": "\xff\xfe"}]}\n\n'),
    "an error in band": streaming(event({"text": "a"}), b'data: {"error": {"message": "boom", "code": 500}}\n\n'),
    "an error without a form": streaming(b'event: error\ndata: {"error": "boom"}\n\n'),
    "an endless event": streaming(b"data: " + b"x" * 3_000_000, b"x" * 3_000_000),
    "an abort": streaming(event({"text": "a", "finish_reason": "abort"}), DONE),
    "a broken connection": streaming(event({"text": "a"}), then=ConnectionResetError()),
    "JSON of something else": JSONResponse({"hello": "world"}),
    "no form of error": Response(b"\xff\x00", status_code=500),
    "FastAPI's error": JSONResponse({"detail": [{"msg": "boom"}]}, 500),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_reply_is_a_502(live: Live, name: str) -> None:
    with pytest.raises(UpstreamLost) as raised:
        await ask(live, BROKEN[name])
    assert raised.value.status == 502


async def test_a_refusal_in_band_is_the_requests_fault(live: Live) -> None:
    told = {"error": {"message": "no such grammar", "type": "BadRequestError", "param": "grammar", "code": 400}}
    with pytest.raises(RequestError, match="no such grammar") as raised:
        await ask(live, streaming(b"data: " + json.dumps(told).encode() + b"\n\n", DONE))
    assert (raised.value.status, raised.value.param) == (400, "grammar")


def without_own_bos() -> Tokenizer:
    """A tokenizer of a model that has a BOS and does not put it in front of a text by itself."""
    bare = backend()
    bare.post_processor = None
    return Tokenizer(bare, bos=SPECIAL[BOS])


@pytest.mark.parametrize("style", ["card", "script"])
@pytest.mark.parametrize("own_bos", [True, False])
async def test_a_chat_sent_as_text_has_the_same_ids_as_one_asked_directly(
    live: Live, own_bos: bool, style: Any
) -> None:
    engine = NullEnginePort(tokenizer="null" if own_bos else without_own_bos())
    direct = Stack(engine, prompt=PromptSettings(style=style))
    key = {"x-api-key": "sk-alice"}
    async with pool_of(live(direct.app), tokenizer=False, key="sk-alice") as pool:
        before = Stack(pool, prompt=PromptSettings(style=style))
        for stack in (before, direct):
            assert (await post(stack.app, BODIES[CHAT], path=CHAT, headers=key)).status == 200
    through, asked = (list(generation.prompt) for generation in engine.seen if generation.prompt != [1])
    assert through == asked
    assert through.count(BOS) == 1


@pytest.mark.parametrize("own_bos", [True, False])
async def test_a_completion_sent_as_text_has_the_tokens_of_the_tokenizers_own_rule(live: Live, own_bos: bool) -> None:
    engine = NullEnginePort(tokenizer="null" if own_bos else without_own_bos())
    async with pool_of(live(Stack(engine).app), tokenizer=False, key="sk-alice") as pool:
        told = await post(Stack(pool).app, BODIES[COMPLETIONS], path=COMPLETIONS, headers={"x-api-key": "sk-alice"})
    assert told.status == 200
    (asked,) = (generation.prompt for generation in engine.seen if generation.prompt != [1])  # but for canaries
    assert list(asked) == prompt_ids("Hello", bos=own_bos)


@pytest.mark.parametrize("answer", [[5], [], {}, {"tokens": "x"}, {"tokens": [7]}, {"tokens": [7], "token_strs": []}])
async def test_a_chat_goes_as_it_is_to_an_engine_that_tells_nothing_of_its_bos(live: Live, answer: Any) -> None:
    engine = Answers(streaming(event({"text": "a"}), event(STOP), DONE), tokenize=answer)
    async with pool_of(live(engine), tokenizer=False) as pool:
        told = await post(Stack(pool).app, BODIES[CHAT], path=CHAT, headers={"x-api-key": "sk-alice"})
    assert told.status == 200
    assert engine.seen[-1]["prompt"] == "USER: Hello\nASSISTANT:"
