"""Which requests are taken for those of one conversation, and that they find its KV cache again."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from synthia_vllm.api.base import GeneratingApi
from synthia_vllm.api.chat import ChatCompletions
from synthia_vllm.api.completions import Completions
from synthia_vllm.api.messages import Messages
from synthia_vllm.api.responses import Responses
from synthia_vllm.engine.port import Affinity
from synthia_vllm.replicas.routing import Router
from tests.api.official import prepared

SYSTEM = "You are Synthia. " * 65
CONVERSATIONS, TURNS = 200, 4
Turns = list[tuple[str, str]]


def messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def prompt(turns: Turns) -> str:
    return "\n".join([f"SYSTEM: {SYSTEM}", *(f"{role.upper()}: {text}" for role, text in turns), "ASSISTANT:"])


APIS: dict[str, tuple[GeneratingApi, Callable[[Turns], dict[str, Any]]]] = {
    "chat": (ChatCompletions(), lambda turns: {"messages": [{"role": "system", "content": SYSTEM}, *messages(turns)]}),
    "messages": (Messages(), lambda turns: {"messages": messages(turns), "system": SYSTEM, "max_tokens": 5}),
    "responses": (Responses(), lambda turns: {"input": messages(turns), "instructions": SYSTEM}),
    "completions": (Completions(), lambda turns: {"prompt": prompt(turns)}),
}


def affinity(api: str, number: int, turn: int) -> Affinity:
    """Of a conversation's turn, from 0 on."""
    said = [(role, f"{role} {at} of {number}") for at in range(turn) for role in ("user", "assistant")]
    kind, body = APIS[api]
    found = prepared(kind, body([*said, ("user", f"user {turn} of {number}")])).sequences[0].affinity
    assert found is not None
    return found


@pytest.mark.parametrize("api", APIS)
def test_conversations_that_share_a_long_system_prompt_have_homes_of_their_own_and_stay(api: str) -> None:
    assert len(SYSTEM) > 1100
    router = Router("affinity", 1.5)
    replicas: list[Any] = [SimpleNamespace(name=f"r{n}", in_flight=5) for n in range(4)]
    homes: dict[int, Any] = {}
    for turn in range(TURNS):
        keys = set()
        for number in range(CONVERSATIONS):
            found = affinity(api, number, turn)
            keys.add(found.key)
            assert found.continued == (turn > 0)
            home = router.pick(replicas, found)
            assert homes.setdefault(number, home) is home
        assert len(keys) == CONVERSATIONS
    assert min(Counter(home.name for home in homes.values()).values()) > CONVERSATIONS / 8


@pytest.mark.parametrize("api", APIS)
def test_a_turn_is_looked_for_where_the_one_before_it_was(api: str) -> None:
    turns = [affinity(api, 1, turn) for turn in range(TURNS)]
    assert [one.key for one in turns[1:]] == [one.next for one in turns[:-1]]
