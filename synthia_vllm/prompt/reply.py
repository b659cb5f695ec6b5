"""What of the model's text is the reply: the card's `string.split("USER:")[0].strip()`, also while it streams."""

from collections.abc import Sequence

from synthia_vllm.prompt.contract import STOP_STRINGS
from synthia_vllm.prompt.stops import stop_strings


def clean(text: str, stops: Sequence[str] = STOP_STRINGS, *, keep_leading: bool = False) -> str:
    """The reply in a whole text: what comes before the first stop string, without outer white space.

    `keep_leading` is for a reply that continues a message, whose first blank is a part of the sentence.
    """
    reply = ReplyFilter(stops, keep_leading=keep_leading)
    return reply.feed(text) + reply.finish()


class ReplyFilter:
    """Streams a reply: feed it text as it is generated, send on what it returns.

    The texts returned by `feed` and `finish`, joined, equal `clean` of the texts fed, joined, wherever the cuts fall.
    The first stop string is the one that ends first. Only what may turn out not to belong to the reply is held back:
    white space at the end, and an end that a stop string could start with. vLLM's own rule holds back the length of the
    longest stop string at all times, which delays the first token of every reply.
    """

    def __init__(self, stops: Sequence[str] = STOP_STRINGS, *, keep_leading: bool = False) -> None:
        self.met: str | None = None  # the stop string that ended the reply: nothing more will come
        self.beyond = 0  # characters at the end of what was fed that are held, or were cut off
        self._stops = stop_strings(tuple(stops))
        self._keep_leading = keep_leading
        self._state = 0
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """Takes text that follows what was fed before; returns what is sure to belong to the reply."""
        if self.met is not None or not text:
            return ""
        stops = self._stops
        last = text[-1]
        if not self._held and last not in stops.begun and not last.isspace() and stops.ended(text) is None:
            return text if self._keep_leading else self._first(text)  # the usual case
        self._state, end = stops.find(text, self._state)
        if not end:
            if not self._held and not self._state and not last.isspace():
                return text if self._keep_leading else self._first(text)
            if text.isspace():
                self._held.append(text)
                self.beyond += len(text)
                return ""
        self._held.append(text)
        held = "".join(self._held)
        if end:
            self.met = stops.met[self._state]
            cut = len(held) - len(text) + end - stops.longest[self._state]
            self._held, self.beyond = [], len(held) - cut
            sure = held[:cut].rstrip()
        else:
            sure = held[: len(held) - stops.depth[self._state]].rstrip()
            self.beyond = len(held) - len(sure)
            self._held = [held[len(sure) :]] if self.beyond else []
        return sure if self._keep_leading else self._first(sure)

    def finish(self) -> str:
        """The rest, when the engine has ended the text."""
        rest, self._held, self.beyond = "".join(self._held).rstrip(), [], 0 if self.met is None else self.beyond
        return rest if self._keep_leading else self._first(rest)

    def _first(self, text: str) -> str:
        """The beginning of the reply, without white space before it."""
        text = text.lstrip()
        self._keep_leading = bool(text)
        return text
