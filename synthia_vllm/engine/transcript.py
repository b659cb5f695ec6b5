"""What is known of one sequence over all attempts at it: its ids as text, and where a stop string ends it."""

from collections.abc import Sequence

from synthia_vllm.engine.port import Generation
from synthia_vllm.engine.tokenizer import TextStream, Tokenizer
from synthia_vllm.prompt.stops import stop_strings


class StopSearch:
    """Finds stop strings in a text that comes in pieces, by vLLM's rule (`v1/engine/detokenizer.py`).

    The one that completes first ends the text; of several that complete together, the first in the list.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._ended = stop_strings(tuple(stops)).ended
        self._kept = max(map(len, stops), default=1) - 1
        self._tail = ""  # of the text before: what a stop string may have begun in

    def feed(self, text: str, *, exempt: int = 0) -> tuple[str, str | None]:
        """The text, up to and with the stop string that ends it, and that one; or all of it and None.

        No stop string may end in the first `exempt` characters.
        """
        known = self._tail + text
        if self._ended(text) is None:  # the usual case: nothing in it can end a stop string
            self._tail = known[-self._kept :] if self._kept else ""
            return text, None
        before = len(self._tail) + exempt
        found, end = None, len(known) + 1
        for stop in self._stops:
            at = known.find(stop, max(0, before - len(stop) + 1), end)
            if at >= 0 and at + len(stop) < end:
                found, end = stop, at + len(stop)
        if found is None:
            self._tail = known[-self._kept :] if self._kept else ""
            return text, None
        return text[: end - len(self._tail)], found


class Transcript:
    """One sequence so far. The engine's ids become text here, so that a character that a seam cuts comes whole.

    Without a tokenizer the text is what engines send.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer | None) -> None:
        sampling = generation.sampling
        self.count = 0  # tokens
        self.whole = True  # whether the last one ended a character
        self.tokenizer = tokenizer
        self._prompt = generation.prompt
        self._skip_special = sampling.skip_special_tokens
        self._min_tokens = sampling.min_tokens
        self._stop_tokens = frozenset(sampling.stop_token_ids)
        self._search = StopSearch(sampling.stop) if sampling.stop else None
        self._stream: TextStream | None = None

    def take(self, ids: Sequence[int], *, stopped: bool = False) -> tuple[str, int | str | None, int]:
        """The text of new tokens, the stop string or token that ends the sequence if one does, and how many are its.

        `stopped`: the engine says that these are the last for a reason of their own. Where that is no stop string, it
        is the last token, which is not a part of the text. Tokens behind a stop string are none of the sequence: of an
        engine that was not told of it, or decodes several at once.
        """
        assert self.tokenizer is not None
        if self._stream is None:
            self._stream = TextStream(self.tokenizer, self._prompt, skip_special_tokens=self._skip_special)
        feed, search, text, last, used = self._stream.feed, self._search, "", "", 0
        for used, token in enumerate(ids, start=1):
            self.count += 1
            last = feed(token)
            if last and search is not None:
                part, stop = search.feed(last, exempt=len(last) if self.count <= self._min_tokens else 0)
                text += part
                if stop is not None:
                    return text, stop, used
            else:
                text += last
        if ids:
            self.whole = bool(last)
            if stopped:
                return text[: len(text) - len(last)], ids[-1] if ids[-1] in self._stop_tokens else None, used
        return text, None, used

    def take_text(self, text: str, count: int) -> tuple[str, str | None]:
        """The same for a text of the engine's own making, of so many tokens."""
        self.count += count
        exempt = len(text) if self.count <= self._min_tokens else 0
        return self._search.feed(text, exempt=exempt) if self._search is not None and text else (text, None)
