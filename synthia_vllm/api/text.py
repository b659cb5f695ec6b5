"""The text of one generated sequence as a client gets it, and what belongs to it: ids, log-probabilities, its end."""

from collections.abc import Iterator, Sequence

import msgspec

from synthia_vllm.api.sampling import contract_stops
from synthia_vllm.engine.port import Delta, Finish, Position
from synthia_vllm.prompt import STOP_STRINGS, ReplyFilter, StopCutter


class Piece(msgspec.Struct):
    """What of a delta goes to the client."""

    text: str = ""
    ids: Sequence[int] = ()  # all that were generated, those of a stop string too
    logprobs: Sequence[Position] = ()  # of the tokens whose text is let go now
    finish: Finish | None = None
    stop_reason: int | str | None = None  # the client's own stop string, or the token, that ended it
    stop: str | None = None  # the stop string that ended it, the contract's too


class SequenceText:
    """Makes the client's text of one sequence's deltas, fed one by one. Made by `contract` or `plain`."""

    def __init__(
        self, own: Sequence[str], *, cutter: StopCutter | None = None, reply: ReplyFilter | None = None
    ) -> None:
        self._own = own
        self._cutter = cutter
        self._reply = reply
        self._fed = 0  # characters; counted where positions are waiting for them
        self._waiting: list[tuple[int, Position]] = []  # (where the token begins, its position)

    @classmethod
    def contract(
        cls, own: Sequence[str], *, keep_leading: bool = False, include_stop: bool = False, min_tokens: int = 0
    ) -> "SequenceText":
        """For replies to conversations: ends before the first stop string, has no outer white space.

        Where `include_stop` (vLLM's `include_stop_str_in_output`) the client's own stop strings stay. With `min_tokens`
        the engine looks for stop strings from there on only, so the client's own are where the engine says they are.
        """
        if include_stop or not own:
            return cls(own, reply=ReplyFilter(STOP_STRINGS, keep_leading=keep_leading))
        if min_tokens:
            return cls(own, cutter=StopCutter(own), reply=ReplyFilter(STOP_STRINGS, keep_leading=keep_leading))
        return cls(own, reply=ReplyFilter(contract_stops(tuple(own)), keep_leading=keep_leading))

    @classmethod
    def plain(cls, stops: Sequence[str], *, include_stop: bool = False) -> "SequenceText":
        """For bare completions: as the engine generates it, without the stop string that ended it."""
        return cls(stops, cutter=StopCutter(stops) if stops and not include_stop else None)

    def feed(self, delta: Delta) -> Piece:
        text, cutter, reply = delta.text, self._cutter, self._reply
        if delta.logprobs is not None or self._fed:
            self._wait(delta)
        if cutter is not None:
            text = cutter.feed(text)
        if reply is not None:
            text = reply.feed(text)
        if delta.finish is not None:
            return self._end(delta, text)
        if delta.logprobs is None:
            return Piece(text, delta.ids)
        return Piece(text, delta.ids, self._let_go())

    def _end(self, delta: Delta, text: str) -> Piece:
        finish, reason, stop = delta.finish, delta.stop_reason, None
        if self._cutter is not None:
            rest = self._cutter.finish(reason)
            text += self._reply.feed(rest) if self._reply is not None else rest
        if self._reply is not None:
            text += self._reply.finish()
            stop = self._reply.met
        if stop is not None:
            finish = "stop"  # also where the engine went on to its end
        elif isinstance(reason, str):
            stop = reason
        if stop is not None:
            reason = stop if stop in self._own else None
        return Piece(text, delta.ids, self._let_go(whole=True), finish, reason, stop)

    def _wait(self, delta: Delta) -> None:
        """Notes where this delta's tokens begin, for `_let_go`. Nothing behind a stop string is counted."""
        if self._reply is not None and self._reply.met is not None:
            return
        if delta.logprobs:
            for begin, position in zip(_beginnings(delta.text, delta.logprobs), delta.logprobs, strict=True):
                self._waiting.append((self._fed + begin, position))
        self._fed += len(delta.text)

    def _let_go(self, *, whole: bool = False) -> list[Position]:
        """The positions of tokens that begin in what has been sent; at the end, `whole`, also of those without text."""
        waiting, end = self._waiting, self._fed
        if not waiting:
            return []
        if self._cutter is not None:
            end -= self._cutter.beyond
        if self._reply is not None:
            end -= self._reply.beyond
        sure = len(waiting)
        if not whole or end < self._fed:
            while sure and waiting[sure - 1][0] >= end:
                sure -= 1
        self._waiting = waiting[sure:]
        return [position for _, position in waiting[:sure]]


def _beginnings(text: str, positions: Sequence[Position]) -> Iterator[int]:
    """Where in a delta's text its tokens begin: exactly for one token, else by their own texts' order in it."""
    begin = 0
    for position in positions:
        yield begin
        piece = position.chosen.text
        found = text.find(piece, begin) if piece else -1
        begin = found + len(piece) if found >= 0 else min(begin + len(piece), len(text))
