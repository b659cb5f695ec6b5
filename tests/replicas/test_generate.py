"""`/inference/v1/generate`: what vLLM is asked, and how its answers are read."""

from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.null.tokens import BOS
from synthia_vllm.engine.port import Generation, Sampling
from synthia_vllm.engine.transcript import Transcript
from synthia_vllm.errors import UpstreamLost
from synthia_vllm.replicas.completions import CompletionsReply
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.generate import GenerateReply
from tests.replicas.engines import (
    GENERATE,
    Answers,
    Live,
    asking,
    body_of,
    count_of,
    pool_of,
    read,
    reply_to,
    streaming,
    text_of,
)

VLLM = Endpoint("http://none", "generate", ["m"], vllm=True)
FULL = Sampling(
    max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.1,
    frequency_penalty=0.2, repetition_penalty=1.1, seed=2**63 - 1, stop=("a", "b"), stop_token_ids=(7,),
    ignore_eos=True, skip_special_tokens=False, spaces_between_special_tokens=False, logprobs=3, logit_bias={5: -1.5},
    allowed_token_ids=(1, 2), bad_words=("x",), structured_outputs={"json": {"type": "object"}},
    extra_args={"mine": [1, 2]},
)  # fmt: skip


def request_of(kind: type[GenerateReply | CompletionsReply], sampling: Sampling, **more: Any) -> bytes:
    generation = Generation(id="1", prompt=[BOS, 5], text="x", sampling=sampling, **more)
    return kind(generation, Transcript(generation, null_tokenizer())).body(VLLM)


def test_vllm_reads_all_of_it() -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    asked = GenerateRequest.model_validate_json(request_of(GenerateReply, FULL, salt="pepper"))
    assert (asked.token_ids, asked.cache_salt, asked.stream) == ([BOS, 5], "pepper", True)
    assert asked.stream_options.include_usage is True
    params = asked.sampling_params
    for name in FULL.__struct_fields__:
        wanted, found = getattr(FULL, name), getattr(params, name)
        if name == "structured_outputs":
            assert found.json == {"type": "object"}
        elif name == "logprobs":
            assert found == 4  # one more: see `logprobs.wanted`
        else:
            assert found == (list(wanted) if isinstance(wanted, tuple) else wanted), name
    assert params.include_stop_str_in_output is True


def test_vllm_makes_no_text_that_nobody_looks_at() -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    plain = GenerateRequest.model_validate_json(request_of(GenerateReply, Sampling(max_tokens=5)))
    assert plain.sampling_params.detokenize is False
    assert GenerateRequest.model_validate_json(request_of(GenerateReply, FULL)).sampling_params.detokenize is True


def test_vllm_reads_all_of_a_completion() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    asked = CompletionRequest.model_validate_json(request_of(CompletionsReply, FULL, salt="pepper"))
    params = asked.to_sampling_params(9, {})
    assert (asked.prompt, asked.model, asked.cache_salt) == ([BOS, 5], "m", "pepper")
    assert (asked.return_token_ids, asked.return_tokens_as_token_ids) == (True, True)
    for name in set(FULL.__struct_fields__) - {"structured_outputs"}:
        wanted, found = getattr(FULL, name), getattr(params, name)
        assert found == (list(wanted) if isinstance(wanted, tuple) else wanted), name


@pytest.mark.parametrize("wanted", [0, 1, 3])
async def test_as_many_logprobs_come_as_were_asked_for(live: Live, wanted: int) -> None:
    async with pool_of(live(NullEngine())) as pool:
        deltas = await read(pool, asking(logprobs=wanted))
    places = [place for delta in deltas for place in delta.logprobs or ()]
    assert len(places) == 12
    assert {len(place.top) for place in places} == {max(1, wanted)}
    assert "".join(place.chosen.text for place in places) == reply_to()
    assert all(place.top[0] == place.chosen for place in places)


async def test_a_prompts_logprobs_come_with_the_reply(live: Live) -> None:
    async with pool_of(live(NullEngine(cached=2))) as pool:
        (delta,) = await read(pool, asking(prompt_logprobs=2))
    assert (delta.text, len(delta.ids), delta.finish, delta.cached) == (reply_to(), 12, "length", 2)
    assert delta.prompt_logprobs is not None
    first, *others = delta.prompt_logprobs
    assert first is None
    assert [(place.chosen.id, place.chosen.rank, len(place.top)) for place in others if place] == [
        (token, 1, 2) for token in asking().prompt[1:]
    ]


async def test_cached_tokens_are_told(live: Live) -> None:
    async with pool_of(live(NullEngine(cached=2))) as pool:
        deltas = await read(pool)
    assert [delta.cached for delta in deltas if delta.cached is not None] == [2]


async def test_an_end_by_eos_or_by_a_stop_token_is_told_apart(live: Live) -> None:
    words = null_tokenizer()
    engine = NullEngine(reply_tokens=3)
    async with pool_of(live(engine), tokenizer=words) as pool:
        deltas = await read(pool)
        assert (text_of(deltas), count_of(deltas)) == (reply_to(tokens=3), 4)
        assert (deltas[-1].finish, deltas[-1].stop_reason) == ("stop", None)
        ids = [token for delta in deltas for token in delta.ids]
        deltas = await read(pool, asking(stop_token_ids=(ids[1],)))
    assert (text_of(deltas), deltas[-1].finish, deltas[-1].stop_reason) == (reply_to(tokens=1), "stop", ids[1])


async def test_a_stop_string_is_the_end_of_the_text(live: Live) -> None:
    stop = reply_to(tokens=3)[-6:-1]  # ends inside the third token
    async with pool_of(live(NullEngine())) as pool:
        deltas = await read(pool, asking(stop=("never", stop)))
    assert (text_of(deltas), count_of(deltas)) == (reply_to(tokens=3)[:-1], 3)
    assert (deltas[-1].finish, deltas[-1].stop_reason) == ("stop", stop)


async def test_an_end_that_vllm_sends_no_chunk_for_is_known_by_the_count(live: Live) -> None:
    def chunk(token: int) -> bytes:
        return b'data: {"choices":[{"index":0,"finish_reason":null,"token_ids":[%d]}]}\n\n' % token

    stream = streaming(chunk(10), chunk(11), b"data: [DONE]\n\n")

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != GENERATE:
            return await Answers(stream)(scope, receive, send)
        answer = stream if await body_of(receive) != b"{}" else PlainTextResponse("token_ids is missing", 400)
        return await answer(scope, receive, send)

    async with pool_of(live(vllm), resume=False) as pool:
        deltas = await read(pool, asking(max_tokens=2))
        assert (count_of(deltas), deltas[-1].finish) == (2, "length")
        with pytest.raises(UpstreamLost, match="before its end"):
            await read(pool, asking(max_tokens=3))
