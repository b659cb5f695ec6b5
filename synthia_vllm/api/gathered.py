"""Streams in larger pieces than the engine's, for clients that ask for them (vLLM's `stream_interval`)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from synthia_vllm.api.base import Counts, Reply
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import SynthiaError

_MOST = 64  # tokens a piece, whatever is asked for: making a piece must not hold up others


class Gathered:
    """Tells each sequence's first tokens at once, and the others so many at a time. A Reply around another.

    The engine is not asked to do it: what it had held back of a reply whose client leaves, nobody would have counted.
    """

    def __init__(self, reply: Reply, interval: int) -> None:
        self._reply = reply
        self._interval = min(interval, _MOST)
        self._begun: set[int] = set()
        self._held: defaultdict[int, list[Delta]] = defaultdict(list)  # by sequence
        self._counts = Counts(0, 0, 0)

    def start(self, counts: Counts) -> bytes:
        return self._reply.start(counts)

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        number = delta.sequence
        self._counts = counts
        held = self._held[number]
        held.append(delta)
        enough = number not in self._begun or sum(len(one.ids) for one in held) >= self._interval
        return self._tell(number) if enough or delta.finish is not None else b""

    def end(self, counts: Counts) -> bytes | list[bytes]:
        return self._reply.end(counts)

    def error(self, error: SynthiaError) -> bytes:
        rest = [self._tell(number) for number in list(self._held)]
        return b"".join([*rest, self._reply.error(error)])

    def _tell(self, number: int) -> bytes:
        self._begun.add(number)
        held = self._held.pop(number)
        return self._reply.feed(held[0] if len(held) == 1 else _joined(held), self._counts)


def _joined(deltas: Sequence[Delta]) -> Delta:
    logprobs = [position for one in deltas for position in one.logprobs or ()]
    return replace(
        deltas[-1],
        ids=[token for one in deltas for token in one.ids],
        text="".join(one.text for one in deltas),
        logprobs=logprobs or None,
    )
