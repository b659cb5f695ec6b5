"""Seams: wherever a stream is cut, its client has what an undisturbed one gives."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.cluster.resume import CHAT, COMPLETIONS, Progress, resumable
from tests.cluster.simulated_vllm import PROMPT, SimulatedVllm

WORDS = [b" the", b" orca", b"\n", b"US", b"ER", b":", b" USER", b"x", b" \xf0\x9f", b"\x98", b"\x80", b"\xc3", b"\xa9"]
USAGE = {"include_usage": True, "continuous_usage_stats": True}


@dataclass
class Client:
    """What a client has of a stream."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    stop: Any = None
    usage: Any = None
    heads: set[tuple[Any, ...]] = field(default_factory=set)
    done: int = 0

    def take(self, data: bytes) -> None:
        for event in data.split(b"\n\n")[:-1]:
            if event == b"data: [DONE]":
                self.done += 1
                continue
            chunk = json.loads(event.removeprefix(b"data: "))
            self.heads.add((chunk["id"], chunk["object"], chunk["created"], chunk["model"]))
            self.usage = chunk.get("usage", self.usage)
            for choice in chunk["choices"]:
                self.text += choice["delta"]["content"] if "delta" in choice else choice["text"]
                self.ids += choice.get("token_ids") or []
                if choice["finish_reason"]:
                    self.finish.append(choice["finish_reason"])
                    self.stop = choice["stop_reason"]


def play(
    engine: SimulatedVllm, route: str, request: dict[str, Any], cuts: Sequence[int], sizes: Sequence[int]
) -> Client:
    """Streams a request; each number of `cuts` is how many events a leg sends before its engine is lost."""
    progress, client = Progress(route, request), Client()
    legs = [*cuts, 10_000]
    path, body = route, progress.first_request()
    for number, length in enumerate(legs):
        for count, event in enumerate(engine.stream(path, body, sizes)):
            if count == length:
                break
            client.take(progress.feed(event))
            if progress.cut_short:
                client.take(progress.close())
            if progress.done:
                return client
        if progress.prompt is None:
            progress = Progress(route, request)
            body = progress.first_request()
            continue
        progress.lost()
        trim(engine, progress)
        rest = progress.next_request(None)
        if rest is None:
            client.take(progress.close())
            return client
        path, body = COMPLETIONS, rest
        assert number < len(legs) - 1, "the last leg must end by itself"
    raise AssertionError


def trim(engine: SimulatedVllm, progress: Progress) -> None:
    """As the exchange does it with the engine's /detokenize."""
    size, ids = progress.last_tokens()
    for cut in range(min(size, 4) if size > 1 else 0):
        kept = ids[: len(ids) - cut]
        known = b"".join(engine.vocabulary[token - 100] for token in kept if token >= 100)
        if not known.decode(errors="replace").endswith("\ufffd"):
            progress.drop(cut)
            break


def whole_characters(script: Sequence[bytes]) -> bool:
    try:
        b"".join(script).decode()
    except UnicodeDecodeError:
        return False
    return True


SCRIPTS = st.lists(st.sampled_from([*WORDS[:8], b"".join(WORDS[8:11])]), min_size=1, max_size=20).map(
    lambda words: [part for word in words for part in ([*WORDS[8:11]] if word.startswith(b" \xf0") else [word])]
)


@given(
    script=SCRIPTS,
    route=st.sampled_from([CHAT, COMPLETIONS]),
    include=st.booleans(),
    ids=st.booleans(),
    stops=st.sampled_from([[], ["\nUSER:", " USER:", "USER:"], ["x"]]),
    min_tokens=st.sampled_from([0, 5]),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    sizes=st.lists(st.integers(1, 3), max_size=8),
)
@settings(max_examples=600, deadline=None)
def test_a_cut_stream_is_the_undisturbed_one(
    script: list[bytes],
    route: str,
    include: bool,
    ids: bool,
    stops: list[str],
    min_tokens: int,
    cuts: list[int],
    sizes: list[int],
) -> None:
    assert whole_characters(script)
    engine = SimulatedVllm(script)
    request: dict[str, Any] = {"stream": True, "stop": stops, "include_stop_str_in_output": include}
    request |= {"stream_options": USAGE, "max_tokens": len(script), "min_tokens": min_tokens, "prompt": "text"}
    if ids:
        request["return_token_ids"] = True
    if route == CHAT:
        del request["prompt"]
    undisturbed = play(engine, route, request, [], [])
    cut = play(engine, route, request, cuts, sizes)
    assert (cut.text, cut.finish, cut.stop) == (undisturbed.text, undisturbed.finish, undisturbed.stop)
    assert len(cut.heads) == cut.done == 1
    assert cut.usage == undisturbed.usage
    if all(size == 1 for size in sizes):  # in a chunk of several, ids may come twice
        assert cut.ids == undisturbed.ids


def test_the_first_engines_bytes_pass_but_for_the_ids() -> None:
    engine = SimulatedVllm([b" a", b" b", b" c"])
    progress = Progress(CHAT, {"stream": True})
    for event in engine.stream(CHAT, progress.first_request(), []):
        sent = progress.feed(event)
        assert b"[1,2,3]" not in sent
        if b"token_ids" in event:
            assert sent.count(b'token_ids":null') == 1
    assert (progress.prompt, len(progress.ids), progress.done) == (PROMPT, 3, True)


def test_tokens_without_text_wait_for_it_but_not_for_ever() -> None:
    engine = SimulatedVllm([b" a", *[b""] * 9])
    progress = Progress(COMPLETIONS, {"stream": True, "prompt": "text", "max_tokens": 10})
    held = []
    for event in engine.stream(COMPLETIONS, progress.first_request(), []):
        progress.feed(event)
        held.append(len(progress.ids))
    assert held[:10] == [1, 1, 1, 1, 1, 2, 3, 4, 5, 10]


@pytest.mark.parametrize(
    ("more", "able"),
    [
        ({}, True),
        ({"stream": False}, False),
        ({"n": 2}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "text"}}, True),
        ({"structured_outputs": {"regex": "a+"}}, False),
        ({"use_beam_search": True}, False),
        ({"prompt": ["a", "b"]}, False),
        ({"prompt": [[1, 2]]}, False),
        ({"prompt": [1, 2]}, True),
        ({"suffix": "x"}, False),
    ],
)
def test_what_can_go_on_elsewhere(more: dict[str, Any], able: bool) -> None:
    assert resumable(COMPLETIONS, {"stream": True, "prompt": "text", **more}) is able


def test_other_routes_have_no_token_ids() -> None:
    assert not resumable("/v1/responses", {"stream": True})
    assert not resumable("/v1/messages", {"stream": True})


def resumed(request: dict[str, Any], route: str = COMPLETIONS) -> Progress:
    """After two tokens of the first engine."""
    engine = SimulatedVllm([b" a", b" b", b" a", b" c"])
    progress = Progress(route, {"stream": True, "max_tokens": 4, **request})
    events = engine.stream(route, progress.first_request(), [])
    for _ in range(3 if route == CHAT else 2):
        progress.feed(next(events))
    progress.lost()
    return progress


def test_the_next_engine_is_asked_for_what_is_left() -> None:
    progress = resumed({"prompt": "text", "seed": 7, "min_tokens": 3, "temperature": 0.3, "logit_bias": {"5": 1}})
    rest = progress.next_request(None)
    assert rest is not None
    assert rest["prompt"] == [*PROMPT, 100, 101]
    assert (rest["max_tokens"], rest["min_tokens"], rest["seed"], rest["temperature"]) == (2, 1, 9, 0.3)
    assert rest["logit_bias"] == {"5": 1}


def test_a_reply_without_a_length_goes_to_the_contexts_end() -> None:
    progress = resumed({"max_tokens": None}, CHAT)
    rest = progress.next_request(50)
    assert rest is not None
    assert rest["max_tokens"] == 50 - len(PROMPT) - 2


def test_penalties_of_what_was_said_become_a_bias() -> None:
    progress = resumed({"prompt": "text", "presence_penalty": 0.5, "frequency_penalty": 0.25})
    rest = progress.next_request(None)
    assert rest is not None
    assert rest["logit_bias"] == {"100": -0.75, "101": -0.75}
    assert (rest["presence_penalty"], rest["frequency_penalty"]) == (0.5, 0.25)


def test_logprobs_of_the_completions_route_take_the_chats_form() -> None:
    progress = resumed({"logprobs": True, "top_logprobs": 1}, CHAT)
    rest = progress.next_request(None)
    assert rest is not None
    assert rest["logprobs"] == 1
    logprobs = {"tokens": [" c"], "token_logprobs": [-0.5], "top_logprobs": [{" c": -0.5, " d": -1.5}]}
    choice = {"index": 0, "text": " c", "logprobs": {**logprobs, "text_offset": [0]}, "finish_reason": None}
    event = {"id": "x", "choices": [{**choice, "stop_reason": None, "prompt_token_ids": None, "token_ids": [103]}]}
    sent = json.loads(progress.feed(b"data: " + json.dumps(event).encode() + b"\n\n").removeprefix(b"data: "))
    entry = {"token": " c", "logprob": -0.5, "bytes": [32, 99]}
    assert sent["choices"][0]["logprobs"] == {"content": [{**entry, "top_logprobs": [entry]}]}
    assert sent["choices"][0]["delta"] == {"content": " c"}


def test_offsets_of_completions_go_on_behind_the_seam() -> None:
    progress = resumed({"prompt": "text", "logprobs": 0})
    logprobs = {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": [{" a": -0.5}], "text_offset": [0]}
    choice = {"index": 0, "text": " a", "logprobs": logprobs, "finish_reason": None, "token_ids": [100]}
    event = b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"
    sent = json.loads(progress.feed(event).removeprefix(b"data: "))
    assert sent["choices"][0]["logprobs"]["text_offset"] == [4]
