"""`/inference/v1/generate` of the stand-in: vLLM's own classes read it, and write the same bytes."""

import json
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.generate import GENERATE
from synthia_vllm.bench.null.tokens import EOS, VOCABULARY, expected, logprob_of, prompt_ids, seed_of, text_of, token_id
from tests.bench.null.test_engine import events
from tests.gateway.live import serving

PROMPT = prompt_ids("What is an orca?")
TOKENS = [token_id(seed_of(PROMPT), at) for at in range(8)]
ALWAYS = {"include_usage": True, "continuous_usage_stats": True}


async def ask(app: ASGIApp | None = None, sampling: dict[str, Any] | None = None, **fields: Any) -> httpx.Response:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4} if sampling is None else sampling, **fields}
    return await post(app or NullEngine(), GENERATE, json=body)


async def post(app: ASGIApp, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://null") as client:
        return await client.post(path, **options)


def ids(reply: httpx.Response) -> list[int]:
    chunks = [json.loads(event) for event in events(reply)]
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]


@pytest.mark.parametrize("options", [None, {"include_usage": True}, ALWAYS, {"continuous_usage_stats": True}])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("n", [1, 3])
async def test_chunks_are_vllms_byte_for_byte(options: dict[str, bool] | None, logprobs: int | None, n: int) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateStreamResponse

    sampling = {"max_tokens": 4, "logprobs": logprobs, "n": n}
    reply = await ask(NullEngine(cached=5), sampling, stream=True, stream_options=options, request_id="7")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = []
    for event in events(reply):
        chunk = GenerateStreamResponse.model_validate_json(event)
        assert chunk.model_dump_json(exclude_none=not chunk.choices) == event
        chunks.append(chunk)
    assert {chunk.request_id for chunk in chunks} == {"generate-tokens-7"}
    told = chunks.pop().usage if options and options.get("include_usage") else None
    assert len(chunks) == 4 * n
    mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == n - 1]
    assert [choice.token_ids for choice in mine] == [[token] for token in TOKENS[:4]]
    assert [choice.finish_reason for choice in mine] == [None, None, None, "length"]
    if told is not None:
        assert (told.prompt_tokens, told.completion_tokens) == (len(PROMPT), 4 * n)
        assert told.prompt_tokens_details.cached_tokens == 5
    continuous = options == ALWAYS
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in chunks[::n]] == (
        [1, 2, 3, 4] if continuous else [None] * 4
    )
    if logprobs is not None:
        content = mine[1].logprobs.content
        assert [(one.token, one.logprob) for one in content] == [(f"token_id:{TOKENS[1]}", logprob_of(1))]
        assert len(content[0].top_logprobs) == max(logprobs, 1)
        assert content[0].top_logprobs[0].token == content[0].token


@pytest.mark.parametrize(
    "sampling", [{"max_tokens": 4}, {"max_tokens": 4, "n": 2, "logprobs": 2, "prompt_logprobs": 1}]
)
async def test_whole_replies_are_vllms_byte_for_byte(sampling: dict[str, Any]) -> None:
    from starlette.responses import JSONResponse
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateResponse

    reply = await ask(sampling=sampling)
    read = GenerateResponse.model_validate_json(reply.content)
    assert JSONResponse(read.model_dump()).body == reply.content
    assert [choice.token_ids for choice in read.choices] == [TOKENS[:4]] * sampling.get("n", 1)
    assert read.usage.completion_tokens == 4 * sampling.get("n", 1)
    if "prompt_logprobs" in sampling:
        assert read.prompt_logprobs[0] is None
        assert [next(iter(likely)) for likely in read.prompt_logprobs[1:]] == PROMPT[1:]


async def test_vllms_request_class_takes_what_we_take() -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": "4", "stop": None}, "stream": "true", "priority": 1}
    assert GenerateRequest.model_validate(body).stream is True
    engine = NullEngine()
    assert ids(await post(engine, GENERATE, json={**body, "cache_salt": "salt"})) == TOKENS[:4]
    assert (engine.asked[0]["cache_salt"], engine.asked[0]["priority"]) == ("salt", 1)


async def test_a_text_made_of_the_ids_is_the_expected_one() -> None:
    assert text_of(ids(await ask(stream=True))) == "".join(expected({"prompt": "What is an orca?"}, 4))


async def test_the_room_is_the_default_of_max_tokens_and_its_bound() -> None:
    engine = NullEngine(max_model_len=len(PROMPT) + 6)
    for sampling in ({}, {"max_tokens": None}, {"max_tokens": 1000}):
        assert len(ids(await ask(engine, sampling, stream=True))) == 6


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"token_ids": []}, "length >= 1"),
        ({"token_ids": [-1]}, ">= 0"),
        ({"token_ids": "text"}, "token_ids"),
        ({"sampling_params": None}, "sampling_params"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens must be at least 1"),
        ({"sampling_params": {"max_tokens": "many"}}, "max_tokens"),
        ({"token_ids": [1] * 200}, "longer than the maximum model length"),
        ({"token_ids": [VOCABULARY]}, "out of vocabulary"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
async def test_what_is_refused_is_refused_in_vllms_form_before_the_stream(fields: dict[str, Any], told: str) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    reply = await ask(NullEngine(max_model_len=100), **{"stream": True, **fields})
    assert reply.status_code == 400
    error = ErrorResponse.model_validate_json(reply.content).error
    assert error.code == 400
    assert told in error.message


async def test_what_is_no_json_is_refused() -> None:
    body = json.dumps({"token_ids": PROMPT, "sampling_params": {}})
    for options in ({"content": body}, {"content": body[1:], "headers": {"content-type": "application/json"}}):
        reply = await post(NullEngine(), GENERATE, **options)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "BadRequestError"


async def test_another_engine_goes_on_with_ids() -> None:
    engine = NullEngine()
    reply = await ask(engine, {"max_tokens": 5}, token_ids=PROMPT + TOKENS[:3], stream=True, stream_options=ALWAYS)
    assert ids(reply) == TOKENS[3:8]
    assert json.loads(events(reply)[-1])["usage"]["prompt_tokens"] == len(PROMPT) + 3
    assert engine.resumed == 1


async def test_a_wrong_seam_is_refused_and_counted() -> None:
    engine = NullEngine()
    for wrong in ([TOKENS[1]], [TOKENS[0], TOKENS[0]], [TOKENS[0], 5]):
        assert (await ask(engine, token_ids=PROMPT + wrong)).status_code == 400
    assert len(engine.wrong_resumes) == 3
    assert (await post(engine, "/fault")).json()["wrong_resumes"] == engine.wrong_resumes


async def test_stop_strings_stop_tokens_and_eos_end_a_reply() -> None:
    text = "".join(expected({"prompt": PROMPT}, 8))
    told = [
        await ask(sampling=sampling)
        for sampling in (
            {"max_tokens": 8, "stop": text[7:12]},
            {"max_tokens": 8, "stop": ["none", text[7:12]], "min_tokens": 3},
            {"max_tokens": 8, "stop_token_ids": [TOKENS[4]]},
        )
    ]
    assert [
        (len(one.json()["choices"][0]["token_ids"]), one.json()["choices"][0]["finish_reason"]) for one in told
    ] == [
        (3, "stop"),
        (8, "length"),
        (5, "stop"),
    ]
    engine = NullEngine(reply_tokens=5)
    assert ids(await ask(engine, {"max_tokens": 8}, stream=True)) == [*TOKENS[:5], EOS]
    assert ids(await ask(engine, {"max_tokens": 8}, token_ids=PROMPT + TOKENS[:3], stream=True)) == [*TOKENS[3:5], EOS]
    assert ids(await ask(engine, {"max_tokens": 8, "ignore_eos": True}, stream=True)) == TOKENS


@pytest.mark.parametrize(("fault", "got"), [(Faults(break_after=3), 2), (Faults(end_after=3), 2)])
def test_a_stream_breaks_or_just_ends(fault: Faults, got: int) -> None:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 5}, "stream": True}
    lines: list[str] = []
    with (
        serving(NullEngine(faults=fault)) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
        client.stream("POST", GENERATE, json=body) as reply,
    ):
        try:
            lines.extend(reply.iter_lines())
            broke = False
        except httpx.RemoteProtocolError:
            broke = True
    assert broke == (fault.break_after is not None)
    assert sum(line.startswith("data: {") for line in lines) <= got
    assert "data: [DONE]" not in lines


async def test_errors_of_a_sick_engine() -> None:
    engine = NullEngine(faults=Faults(status=503))
    assert (await ask(engine)).status_code == 503
    engine.faults.change({"status": None, "dead": True})
    assert (await ask(engine)).status_code == 500
    engine.faults.change({"dead": False, "usage_lie": 2})
    assert (await ask(engine)).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("fault", [Faults(), Faults(end_after=200)])
async def test_bursts_are_the_same_bytes(fault: Faults) -> None:
    streams = [
        (await ask(NullEngine(burst=burst, faults=fault), {"max_tokens": 210}, stream=True, request_id="1")).content
        for burst in (1, 7, 64)
    ]
    assert streams[0] == streams[1] == streams[2]
    assert streams[0].count(b"token_ids") == (fault.end_after or 211) - 1


async def test_an_engine_without_the_route_says_404() -> None:
    engine = NullEngine(generate_route=False)
    reply = await ask(engine)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == 404
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=engine), base_url="http://null") as client:
        assert "max_model_len" not in (await client.get("/v1/models")).json()["data"][0]
        assert (await client.get(GENERATE)).status_code == 404
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=NullEngine()), base_url="http://null") as client:
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 1 << 17
        assert (await client.get(GENERATE)).status_code == 405


async def test_the_counters_count() -> None:
    engine = NullEngine()
    await ask(engine, stream=True)
    assert (engine.prompt_tokens, engine.generated, engine.running) == (len(PROMPT), 4, 0)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=engine), base_url="http://null") as client:
        assert 'vllm:generation_tokens_total{engine="0",model_name="null"} 4.0' in (await client.get("/metrics")).text
