"""Finds stop strings in a text that comes piece by piece, reading every character once."""

import re
from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """An automaton of several stop strings (Aho and Corasick, 1975).

    A state stands for the longest end of the text read so far that a stop string begins with; state 0 for none. Where
    several stop strings end at one character, the engine's rule holds: the first of the list is the one that was met
    (vLLM's `check_stop_strings`). The text is cut where the longest of them begins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.depth = [0]  # of a state: how many characters at the end of the text it stands for
        self.met: list[str | None] = [None]  # the stop string that a state completes
        self.longest = [0]  # the length of the longest stop string that a state completes
        self._next: list[dict[str, int]] = [{}]
        self._back = [0]
        for stop in self.stops:
            self._add(stop)
        self._link()
        # A text that ends with none of `begun` and holds none of `ended` leaves state 0 as it was.
        self.begun = frozenset("".join(self.stops))
        ends = "".join(map(re.escape, sorted({stop[-1] for stop in self.stops})))
        self.ended = re.compile(f"[{ends}]" if ends else "(?!)").search

    def find(self, text: str, state: int) -> tuple[int, int]:
        """Reads a text up to and with the first stop string; returns the state and where that ended, 0 for nowhere."""
        following, back, longest = self._next, self._back, self.longest
        for position, character in enumerate(text, 1):
            while (onward := following[state].get(character)) is None and state:
                state = back[state]
            state = onward or 0
            if longest[state]:
                return state, position
        return state, 0

    def read(self, text: str, state: int) -> int:
        """Reads all of a text, over the stop strings in it."""
        following, back = self._next, self._back
        for character in text:
            while (onward := following[state].get(character)) is None and state:
                state = back[state]
            state = onward or 0
        return state

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            onward = self._next[state].get(character)
            if onward is None:
                onward = self._next[state][character] = len(self._next)
                self._next.append({})
                self._back.append(0)
                self.depth.append(self.depth[state] + 1)
                self.met.append(None)
                self.longest.append(0)
            state = onward
        self.met[state] = stop
        self.longest[state] = len(stop)

    def _link(self) -> None:
        """Links every state to the longest shorter one that the text is in as well, nearest to the start first."""
        order = {stop: index for index, stop in reversed(list(enumerate(self.stops)))}
        level = list(self._next[0].values())
        while level:
            deeper = []
            for state in level:
                shorter = self._back[state]
                if (other := self.met[shorter]) is not None:
                    own = self.met[state]
                    self.met[state] = other if own is None or order[other] < order[own] else own
                    self.longest[state] = self.longest[state] or self.longest[shorter]
                for character, onward in self._next[state].items():
                    back = shorter
                    while character not in self._next[back] and back:
                        back = self._back[back]
                    self._back[onward] = self._next[back].get(character, 0)
                    deeper.append(onward)
            level = deeper


@lru_cache(maxsize=16)  # one of the longest kind is a few megabytes
def stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """The automaton of these stop strings, kept for the next request with the same."""
    return StopStrings(stops)


class StopCutter:
    """Takes the stop string that ended a text off it, and holds back only an end that one could be.

    Unlike `ReplyFilter` it changes nothing else, and a stop string is only where the engine says that it was.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.beyond = 0  # characters at the end of what was fed that are held, or were cut off
        self._stops = stop_strings(tuple(stops))
        self._state = 0
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes text that follows what was fed before; returns what is sure to stay."""
        if not text or (not self._held and text[-1] not in self._stops.begun):
            return text
        self._state = self._stops.read(text, self._state)
        text = self._held + text
        self.beyond = self._stops.depth[self._state]
        sure = len(text) - self.beyond
        self._held = text[sure:]
        return text[:sure]

    def finish(self, stop: object) -> str:
        """The rest; `stop` is the engine's stop_reason, a text where a stop string ended it."""
        rest, self._held, self.beyond = self._held, "", 0
        if not isinstance(stop, str) or not rest.endswith(stop):
            return rest
        self.beyond = len(stop)
        return rest[: -len(stop)]
