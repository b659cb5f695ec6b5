"""Where a sweep's requests come from: made-up words of drawn lengths, or a file's conversations in a random order."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from synthia_vllm.bench.client import Call
from synthia_vllm.bench.dataset import Entry
from synthia_vllm.bench.prompts import Lengths, Prompts


class Source(Protocol):
    def take(self, count: int) -> list[Call]:
        """So many requests, which go on where the last ones ended."""
        ...


class MadeUp:
    """English words, each about a token; no two prompts alike.

    already   tokens of each prompt that are before these, as a shared prefix
    """

    def __init__(self, prompt: Lengths, output: Lengths, seed: str, salt: str, already: int = 0) -> None:
        self._prompt, self._output, self._already = prompt, output, already
        self._random = random.Random(f"lengths/{seed}")
        self._prompts = Prompts(f"{seed}/{salt}")

    def take(self, count: int) -> list[Call]:
        return [self._call() for _ in range(count)]

    def _call(self) -> Call:
        words = max(1, self._prompt.draw(self._random) - self._already)
        message = {"role": "user", "content": self._prompts.text(words)}
        return Call(self._output.draw(self._random), messages=(message,))


class FromFile:
    """The entries of a data set in an order that the seed decides; from the beginning when all have been sent.

    output   of all replies; None: of the file's own lengths
    others   of replies whose length the file does not tell
    """

    def __init__(self, entries: Sequence[Entry], output: Lengths | None, others: Lengths, seed: str) -> None:
        self._output, self._others = output, others
        self._random = random.Random(f"order/{seed}")
        self._entries = list(entries)
        self._random.shuffle(self._entries)
        self._sent = 0

    def take(self, count: int) -> list[Call]:
        turn = [self._entries[(self._sent + n) % len(self._entries)] for n in range(count)]
        self._sent += count
        return [Call(self._length(entry), messages=entry.messages) for entry in turn]

    def _length(self, entry: Entry) -> int:
        if self._output is not None:
            return self._output.draw(self._random)
        return entry.output_tokens or self._others.draw(self._random)


class Prefixed:
    """Another source's requests, each with one of a few beginnings before it."""

    def __init__(self, source: Source, tokens: int, count: int, seed: str, salt: str) -> None:
        prompts = Prompts(f"prefixes/{seed}/{salt}")
        self._prefixes = [prompts.text(tokens) for _ in range(count)]
        self._source = source
        self._random = random.Random(f"prefixes/{seed}")

    def take(self, count: int) -> list[Call]:
        return [_after(self._random.choice(self._prefixes), call) for call in self._source.take(count)]


class AsText:
    """Another source's chats as one text each, for /v1/completions."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def take(self, count: int) -> list[Call]:
        return [
            replace(call, prompt="\n\n".join(message["content"] for message in call.messages), messages=())
            for call in self._source.take(count)
        ]


def _after(prefix: str, call: Call) -> Call:
    first, *others = call.messages
    begun: Mapping[str, str] = {**first, "content": f"{prefix} {first['content']}"}
    return replace(call, messages=(begun, *others))
