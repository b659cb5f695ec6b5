"""Conversations of several turns with time to think between them, in the Synthia format: a prefix that grows."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from synthia_vllm.bench.client import Call, Reply
from synthia_vllm.bench.measuring import Kind, Load
from synthia_vllm.bench.prompts import Span
from synthia_vllm.prompt import SYSTEM_PROMPTS, render


@dataclass(frozen=True)
class Conversations:
    """`users` people who talk at once, each `turns` times; they think for `think_s` on average (exponential).

    All have the card's Tree-of-Thoughts system message, so the first part of the prefix is everyone's. `words` is the
    length of what a user says, about a token each.
    """

    users: int
    turns: int
    think_s: float
    words: int
    output: Span
    kind: Kind = "conversations"
    streams: int | None = None
    rate: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"conversations, {self.users} users, {self.turns} turns"

    async def drive(self, load: Load) -> None:
        plans = []
        for _ in range(self.users):
            texts = [load.prompts.text(self.words) for _ in range(self.turns)]
            pauses = [load.random.expovariate(1 / self.think_s) for _ in range(self.turns)]
            plans.append((texts, pauses, [self.output.draw(load.random) for _ in range(self.turns)]))
        async with asyncio.TaskGroup() as group:
            for number, plan in enumerate(plans):
                group.create_task(self._talk(load, f"user {number + 1}", *plan))

    async def _talk(self, load: Load, user: str, texts: list[str], pauses: list[float], lengths: list[int]) -> None:
        messages: list[Mapping[str, str]] = [{"role": "system", "content": SYSTEM_PROMPTS["tot"]}]
        done = 0.0
        for text, pause, length in zip(texts, pauses, lengths, strict=True):
            messages.append({"role": "user", "content": text})
            if load.client.target.chat:
                call = Call(length, messages=tuple(messages), user=user)
            else:
                call = Call(length, prompt=render(messages), user=user)
            reply = Reply()
            request = await load.send(call, done + pause, into=reply)
            if request.error is not None:
                return  # as a person would who got no answer
            done = request.done_s
            messages.append({"role": "assistant", "content": "".join(reply.text).strip() or "…"})
