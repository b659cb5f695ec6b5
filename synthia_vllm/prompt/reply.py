"""What of the model's text is the reply: the card's `string.split("USER:")[0].strip()`, also while it streams."""

from collections.abc import Sequence

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
        self._stops = tuple(stops)
        self._keep_leading = keep_leading
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes text that follows what was fed before; returns what is sure to belong to the reply."""
        if self.stopped or not text:
            return ""
        self._held += text
        if not self._keep_leading:
            self._held = self._held.lstrip()
        cut = min((at for at in map(self._held.find, self._stops) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            sure, self._held = self._held[:cut].rstrip(), ""
        else:
            sure = self._held[: self._sure_end()].rstrip()
            self._held = self._held[len(sure) :]
        if sure:
            self._keep_leading = True
        return sure

    def finish(self) -> str:
        """The rest, when the engine has ended the text."""
        rest, self._held = self._held.rstrip(), ""
        return rest

    def _sure_end(self) -> int:
        """Where the longest end of the held text starts that is the beginning of a stop string."""
        held = self._held
        return min(
            len(held) - size
            for stop in self._stops or ("",)
            for size in range(min(len(stop), len(held) + 1))
            if held.endswith(stop[:size])
        )
