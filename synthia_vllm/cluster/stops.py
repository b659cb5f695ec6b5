"""Stop strings of a reply that more than one engine generates."""

from collections.abc import Mapping, Sequence
from typing import Any


def stop_strings(request: Mapping[str, Any]) -> tuple[str, ...]:
    """The request's own, in its order, which decides where several match."""
    given = request.get("stop") or ()
    return (given,) if isinstance(given, str) else tuple(given)


class StopCutter:
    """Takes the stop string off a text whose engine leaves it in, as vLLM does with `include_stop_str_in_output` off.

    What a stop string could start with is held until more text comes. An engine would hold it too, and lose it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes text, returns what can be sent."""
        text = self._held + text
        size = next((size for size in range(min(self._longest - 1, len(text)), 0, -1) if self._begins(text, size)), 0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def finish(self, text: str, stop: object) -> str:
        """The last text; `stop` is the engine's stop_reason, a text where a stop string ended the reply."""
        text, self._held = self._held + text, ""
        return text.removesuffix(stop) if isinstance(stop, str) else text

    def _begins(self, text: str, size: int) -> bool:
        return any(stop.startswith(text[len(text) - size :]) for stop in self._stops)


class StopWatch:
    """Finds a stop string that begins before a seam and ends behind it, which neither engine can see."""

    def __init__(self, stops: Sequence[str], before: str) -> None:
        self._stops = stops
        self._longest = max(map(len, stops))
        self._text = before[-self._longest :]
        self._seam = len(self._text)

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text up to and with such a stop string, and that stop string; or all of the text and None."""
        known = len(self._text)
        if known - self._seam >= self._longest:
            return text, None  # what begins now is the engine's to find
        self._text += text
        for stop in self._stops:
            at = self._text.find(stop, max(0, self._seam - len(stop) + 1))
            if 0 <= at < self._seam:
                return self._text[known : at + len(stop)], stop
        return text, None
