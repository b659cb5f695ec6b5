"""Where the replies of null engines end: after `max_tokens`, at EOS, at a stop token, or within a stop string."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, count, islice

from synthia_vllm.bench.null.tokens import EOS, FIRST_OF_REPLIES, WORDS, walk_of
from synthia_vllm.engine.port import Finish, Sampling

Piece = tuple[tuple[int, ...], str]  # a token and its text
_MASK = len(WORDS) - 1
_LETTERS = frozenset("".join(WORDS))


@dataclass(slots=True)
class Ending:
    """The number of a reply's tokens, and what its last one is in place of the piece that is there."""

    count: int
    finish: Finish = "length"
    stop_reason: int | str | None = None
    last: Piece | None = None

    def of(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Those pieces, with this end."""
        return pieces if self.last is None else chain(islice(pieces, self.count - 1), (self.last,))


def words(seed: int, begun: int = 0) -> Iterator[Piece]:
    """The tokens of a reply, without end."""
    start, step = walk_of(seed)
    table = _table()
    return (table[number & _MASK] for number in count(start + begun * step, step))


def may_stop(sampling: Sampling) -> bool:
    """Whether words can hold a stop string, or be a stop token."""
    return bool(sampling.stop_token_ids) or any(_LETTERS.issuperset(stop) for stop in sampling.stop)


def ending(
    pieces: Callable[[], Iterator[Piece]], sampling: Sampling, most: int, ends_after: int | None, look: bool
) -> Ending:
    """Of a reply of these pieces. It ends with EOS after so many tokens, if told so; `look`: whether it may stop."""
    found = Ending(most)
    if ends_after is not None and not sampling.ignore_eos and max(ends_after, sampling.min_tokens) < most:
        found = Ending(max(ends_after, sampling.min_tokens) + 1, "stop", None, ((EOS,), ""))
    if not look or not (sampling.stop or sampling.stop_token_ids):
        return found
    # Pieces come again, so there is an end to looking.
    ahead = list(islice(pieces(), min(found.count, len(WORDS) + max(map(len, sampling.stop), default=0))))
    if found.last is not None and len(ahead) == found.count:
        ahead[-1] = found.last
    for number, (ids, _) in enumerate(ahead, start=1):
        if number > sampling.min_tokens and ids[-1] in sampling.stop_token_ids:
            found = Ending(number, "stop", ids[-1])
            break
    return _stop_string(ahead[: found.count], sampling) or found


def _stop_string(ahead: list[Piece], sampling: Sampling) -> Ending | None:
    """The first stop string that ends after `min_tokens`. As an engine's, it stays in the text and ends it."""
    ends = list(accumulate(len(text) for _, text in ahead))
    whole = "".join(text for _, text in ahead)
    early = ends[sampling.min_tokens - 1] if 0 < sampling.min_tokens <= len(ends) else 0
    first: tuple[int, str] | None = None
    for stop in sampling.stop:
        at = whole.find(stop, max(0, early - len(stop) + 1))
        if at >= 0 and (first is None or at + len(stop) < first[0]):
            first = at + len(stop), stop
    if first is None:
        return None
    end, stop = first
    at = bisect_left(ends, end)
    ids, text = ahead[at]
    return Ending(at + 1, "stop", stop, (ids, text[: len(text) - (ends[at] - end)]))


@cache
def _table() -> tuple[Piece, ...]:
    return tuple(((FIRST_OF_REPLIES + number,), word) for number, word in enumerate(WORDS))
