"""The form in which a reply's deltas are journaled, and the event ids that tell how much of a stream a client has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from synthia_vllm.engine.port import Delta, Said
from synthia_vllm.errors import RequestError

_ID = r"\d{1,10}"
_RECORD = rf"(?:{_ID}(?:,{_ID})*)?(?:/(?:l|s(?:{_ID})?|i\d{{1,4}}))?"
_RECORD_PARTS = re.compile(rf"((?:{_ID}(?:,{_ID})*)?)(?:/([lsi])(\d*))?")
_EVENT = re.compile(rf"(\d{{1,9}})((?:\.{_RECORD})*)(?:([~!])(\d{{1,9}}))?")
MOST_UNKEPT = 64  # deltas that an event's id carries: the journal is behind by one write at most where all is well


def record_of(delta: Delta, stops: Sequence[str]) -> str:
    """A delta as `ids[/finish]`: `12,34`, `/l` (length), `7/s` (EOS), `7/s2` (stop token 2), `7/i0` (stop string 0)."""
    ids = ",".join(map(str, delta.ids))
    if delta.finish is None:
        return ids
    if delta.finish == "length":
        return f"{ids}/l"
    reason = delta.stop_reason
    if isinstance(reason, str):
        return f"{ids}/i{stops.index(reason)}"
    return f"{ids}/s" if reason is None else f"{ids}/s{reason}"


def said(record: str, stops: Sequence[str]) -> Said:
    """The reverse of `record_of`. Raises ValueError for what is no record of such a sequence."""
    found = _RECORD_PARTS.fullmatch(record)
    if found is None:
        raise ValueError(f"{record!r} is no record of a delta")
    ids = tuple(map(int, found[1].split(","))) if found[1] else ()
    kind, number = found[2], found[3]
    if kind is None:
        return Said(ids)
    if kind == "l":
        return Said(ids, "length")
    if kind == "i":
        if int(number) >= len(stops):
            raise ValueError(f"there is no stop string {number}")
        return Said(ids, "stop", stops[int(number)])
    return Said(ids, "stop", int(number) if number else None)


@dataclass(frozen=True, slots=True)
class Position:
    """How much of a stream a client has, as the id of the last event that it got tells.

    `kept`   deltas that were in the journal then
    `more`   records of those behind them, which the journal may not have
    `event`  events of the last delta's chunk that it has; 0: all of them
    `ended`  these are events of the stream's end, behind all deltas
    """

    kept: int
    more: tuple[str, ...] = ()
    event: int = 0
    ended: bool = False

    @property
    def deltas(self) -> int:
        return self.kept + len(self.more)


def position(event_id: bytes) -> Position:
    """What a `Last-Event-ID` says. Raises RequestError."""
    found = _EVENT.fullmatch(event_id.decode("latin-1"))
    if found is None:
        raise RequestError("this is no id of an event of this server", param="Last-Event-ID")
    more = tuple(found[2].split(".")[1:])
    if len(more) > MOST_UNKEPT:
        raise RequestError("this id has more in it than any of this server's", param="Last-Event-ID")
    return Position(int(found[1]), more, int(found[4] or 0), ended=found[3] == "!")
