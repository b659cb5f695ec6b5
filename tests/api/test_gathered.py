import json
from typing import Any

import pytest

from synthia_vllm.api.base import GeneratingApi
from synthia_vllm.api.chat import ChatCompletions
from synthia_vllm.api.completions import Completions
from synthia_vllm.api.gathered import Gathered
from synthia_vllm.api.messages import Messages
from synthia_vllm.api.responses import Responses
from synthia_vllm.engine.port import Delta
from tests.api.official import broken, position, prepared, reply, said

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
WORDS = [f" w{number}" for number in range(10)]
APIS: list[tuple[GeneratingApi, dict[str, Any]]] = [
    (ChatCompletions(), {"messages": MESSAGES}),
    (Completions(), {"prompt": "Hi"}),
    (Responses(), {"input": "Hi"}),
    (Messages(), {"messages": MESSAGES, "max_tokens": 20}),
]


def pieces(ready: Any, deltas: list[Delta], *given: Any) -> list[str]:
    """The texts that a stream brings."""
    found = []
    for line in b"".join(reply(ready, deltas, *given)).decode().split("\n"):
        if not line.startswith("data: {"):
            continue
        told = json.loads(line.removeprefix("data: "))
        for choice in told.get("choices", ()):
            found.append(choice.get("text", choice.get("delta", {}).get("content")))
        if told.get("type") in ("response.output_text.delta", "content_block_delta"):
            found.append(told["delta"] if isinstance(told["delta"], str) else told["delta"]["text"])
    return [text for text in found if text]


@pytest.mark.parametrize(("api", "body"), APIS)
def test_the_first_token_is_told_at_once_and_the_others_so_many_at_a_time(
    api: GeneratingApi, body: dict[str, Any]
) -> None:
    ready = prepared(api, {**body, "model": "synthia", "stream": True})
    ready.reply = Gathered(ready.reply, 4)
    told = pieces(ready, said(*WORDS))
    assert [text.split() for text in told] == [["w0"], ["w1", "w2", "w3", "w4"], ["w5", "w6", "w7", "w8"], ["w9"]]


def test_each_sequence_is_gathered_apart() -> None:
    ready = prepared(Completions(), {"model": "synthia", "prompt": "Hi", "n": 2, "stream": True})
    ready.reply = Gathered(ready.reply, 3)
    deltas = [Delta([5], text, sequence=number) for text in "abcd" for number in (0, 1)]
    deltas += [Delta([5], "e", "stop", sequence=number) for number in (0, 1)]
    assert pieces(ready, deltas) == ["a", "a", "bcd", "bcd", "e", "e"]


def test_logprobs_are_kept() -> None:
    ready = prepared(Completions(), {"model": "synthia", "prompt": "Hi", "logprobs": 0, "stream": True})
    ready.reply = Gathered(ready.reply, 100)
    deltas = said(*WORDS)
    for delta in deltas:
        delta.logprobs = [position(delta.text)]
    chunks = [json.loads(line[6:]) for line in b"".join(reply(ready, deltas)).split(b"\n\n") if line[6:7] == b"{"]
    tokens = [token for chunk in chunks for choice in chunk["choices"] for token in choice["logprobs"]["tokens"]]
    assert tokens == WORDS


def test_what_was_held_is_told_before_an_error() -> None:
    ready = prepared(Completions(), {"model": "synthia", "prompt": "Hi", "stream": True})
    ready.reply = Gathered(ready.reply, 100)
    assert pieces(ready, said(*WORDS)[:-1], broken()) == [" w0", "".join(WORDS[1:-1])]


def test_a_piece_has_a_bound() -> None:
    ready = prepared(Completions(), {"model": "synthia", "prompt": "Hi", "max_tokens": 200, "stream": True})
    ready.reply = Gathered(ready.reply, 10**9)
    assert max(len(text) for text in pieces(ready, said(*"x" * 200))) == 64
