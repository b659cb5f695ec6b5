"""What of the model's text is the reply: the card's `string.split("USER:")[0].strip()`, also while it streams."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from synthia_vllm.prompt.contract import STOP_STRINGS


def clean(text: str, stops: Sequence[str] = STOP_STRINGS, *, keep_leading: bool = False) -> str:
    """The reply in a whole text: what comes before the first stop string, without outer white space.

    `keep_leading` is for a reply that continues a message, whose first blank is a part of the sentence.
    """
    reply = ReplyFilter(stops, keep_leading=keep_leading)
    return reply.feed(text) + reply.finish()


class ReplyFilter:
    """Streams a reply: feed it text as it is generated, send on what it returns.

    The texts returned by `feed` and `finish`, joined, equal `clean` of the texts fed, joined, wherever the cuts fall.
    Only what may turn out not to belong to the reply is held back: white space at the end, and an end that a stop
    string could start with. vLLM's own rule holds back the length of the longest stop string at all times, which
    delays the first token of every reply.
    """

    def __init__(self, stops: Sequence[str] = STOP_STRINGS, *, keep_leading: bool = False) -> None:
        self.stopped = False  # a stop string was met: nothing more will come
        self._patterns = _patterns(tuple(stops))
        self._keep_leading = keep_leading
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes text that follows what was fed before; returns what is sure to belong to the reply."""
        if self.stopped or not text:
            return ""
        patterns, held = self._patterns, self._held + text if self._held else text
        if not self._keep_leading:
            held = held.lstrip()
        if found := patterns.stop.search(held):
            self.stopped = True
            sure, held = held[: found.start()].rstrip(), ""
        elif held and held[-1] not in patterns.last and not held[-1].isspace():
            sure, held = held, ""  # the usual case
        else:
            begun = patterns.begun.search(held)
            sure = (held[: begun.start()] if begun else held).rstrip()
            held = held[len(sure) :]
        self._held = held
        if sure:
            self._keep_leading = True
        return sure

    def finish(self) -> str:
        """The rest, when the engine has ended the text."""
        rest, self._held = self._held.rstrip(), ""
        return rest


@dataclass(frozen=True, slots=True)
class _Patterns:
    stop: re.Pattern[str]  # a stop string
    begun: re.Pattern[str]  # at the end of a text, what a stop string could start with
    last: frozenset[str]  # the characters that `begun` can end with


@lru_cache(maxsize=1024)
def _patterns(stops: tuple[str, ...]) -> _Patterns:
    beginnings = sorted({stop[:size] for stop in stops for size in range(1, len(stop))}, key=len, reverse=True)
    return _Patterns(
        stop=_any_of(stops),
        begun=re.compile(rf"(?:{_any_of(beginnings).pattern})\Z"),
        last=frozenset(beginning[-1] for beginning in beginnings),
    )


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
