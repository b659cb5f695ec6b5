"""Prompts that are the same wherever the seed is, of exactly so many tokens, and how many those are."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

# Ids that every Llama-family vocabulary has, above the control tokens and bytes and below the smallest, 32000.
FIRST_ID, LAST_ID = 1000, 30000
_WORDS = re.findall(
    r"\w+",
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face level door",
)


@dataclass(frozen=True)
class Span:
    """A number of tokens, drawn evenly between two."""

    least: int
    most: int

    @classmethod
    def of(cls, given: "int | Sequence[int] | Span") -> "Span":
        """From a number or a pair. Raises ValueError."""
        if isinstance(given, Span):
            return given
        least, most = (given, given) if isinstance(given, int) else TypeAdapter(tuple[int, int]).validate_python(given)
        if not 1 <= least <= most:
            raise ValueError(f"tokens: {given}, where a number above 0, or least and most, are wanted")
        return cls(least, most)

    def draw(self, source: random.Random) -> int:
        return self.least if self.least == self.most else source.randint(self.least, self.most)

    @property
    def mean(self) -> float:
        return (self.least + self.most) / 2

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True)
class Normal:
    """A number of tokens, normally distributed; one at least, and at most twice the mean, so that the mean holds."""

    mean: float
    deviation: float

    def draw(self, source: random.Random) -> int:
        return round(min(max(source.gauss(self.mean, self.deviation), 1), 2 * self.mean - 1))

    def __str__(self) -> str:
        return f"{self.mean:g}:{self.deviation:g}"


Lengths = Span | Normal


def lengths(text: str) -> Lengths:
    """From `512`, `128-512` (evenly between the two) or `512:128` (mean and standard deviation). Raises ValueError."""
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        return Span.of((int(found[1]), int(found[2] or found[1])))
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) and int(found[1]) >= 1:
        return Normal(int(found[1]), int(found[2]))
    raise ValueError(f"{text!r}, where a number of tokens as 512, 128-512 or 512:128 (mean and deviation) is wanted")


class Prompts:
    """No two prompts of one seed begin alike: a prefix cache helps only where the workload wants it to."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(f"prompts/{seed}")

    def ids(self, count: int) -> list[int]:
        return self._random.choices(range(FIRST_ID, LAST_ID), k=count)

    def text(self, words: int) -> str:
        """English words, each about a token."""
        return " ".join(self._random.choices(_WORDS, k=words))
