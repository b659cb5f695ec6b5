"""One reply as it is journaled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from synthia_vllm.api.base import Counts, Reply
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import RequestError, SynthiaError
from synthia_vllm.gateway.journal.records import MOST_UNKEPT, Position, record_of

_UNKNOWN = -1  # the id of a token whose engine tells none


@dataclass(slots=True, eq=False)
class Entry:
    """What one gateway keeps of a reply, and how much of that is in Redis."""

    name: str  # in Redis: of the user and his X-Request-Id
    owner: str  # the exchange that generates it now
    run: str  # the one that began it: the reply's own id
    created: int  # Unix time, seconds, of that
    digest: str  # of what was asked
    stops: Sequence[str] = ()
    records: list[str] = field(default_factory=list)
    kept: int = 0  # records that are in Redis
    known: bool = False  # Redis has had it
    settled: int = 0  # generated tokens that others were billed for
    prompt_settled: bool = False
    taken: bool = False  # another gateway goes on with it
    lost: bool = False  # it can't be journaled (any more)
    on_taken: Callable[[], None] = lambda: None

    def add(self, delta: Delta) -> None:
        if _UNKNOWN in delta.ids or (isinstance(delta.stop_reason, str) and delta.stop_reason not in self.stops):
            self.lost = True
        self.records.append("" if self.lost else record_of(delta, self.stops))

    def event_id(self, deltas: int) -> str:
        """Tells that a client has so many deltas; empty where it could not go on from there."""
        kept = min(self.kept, deltas)
        unkept = self.records[kept:deltas]
        if self.lost or len(unkept) > MOST_UNKEPT:
            return ""
        return ".".join((str(kept), *unkept)) if unkept else str(kept)

    def extend(self, had: Position) -> None:
        """Adds what a client has that did not get into the journal. Raises RequestError where the two disagree."""
        both = len(self.records) - had.kept
        if both < 0 or list(had.more[:both]) != self.records[had.kept : had.kept + len(had.more)]:
            raise RequestError("this id is not of this reply", param="Last-Event-ID")
        self.records += had.more[both:]


class Numbered:
    """Gives each event of a stream its id, and leaves out those that the client has. A Reply around another.

    The chunks of a reply are the same whenever its deltas are: so an event is known by the deltas before it and its
    place among the events of its chunk.
    """

    def __init__(self, reply: Reply, entry: Entry, had: Position | None = None) -> None:
        self._reply = reply
        self._entry = entry
        self._had = had
        self._fed = 0  # deltas

    def start(self, counts: Counts) -> bytes:
        return self._numbered(self._reply.start(counts), "0", self._had_of_chunk())

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        chunk = self._reply.feed(delta, counts)
        self._fed += 1
        return self._numbered(chunk, self._entry.event_id(self._fed), self._had_of_chunk()) if chunk else b""

    def end(self, counts: Counts) -> bytes | list[bytes]:
        last = self._reply.end(counts)
        had = self._had.event if self._had is not None and self._had.ended else 0
        told = self._entry.event_id(self._fed)
        return self._numbered(last if isinstance(last, bytes) else b"".join(last), told, had, "!")

    def error(self, error: SynthiaError) -> bytes:
        """With an empty id, which takes back those before: there is nothing to come back for."""
        return b"id: \n%b" % self._reply.error(error)

    def _had_of_chunk(self) -> int | None:
        """Events of the chunk at hand that the client has; None: all."""
        had = self._had
        if had is None or self._fed > had.deltas:
            return 0
        return had.event if self._fed == had.deltas and not had.ended and had.event else None

    def _numbered(self, chunk: bytes, told: str, had: int | None, mark: str = "~") -> bytes:
        if had is None or not chunk:
            return b""
        if mark == "~" and not had and chunk.count(b"\n\n") == 1:
            return b"id: %b\n%b" % (told.encode(), chunk)
        *events, _ = chunk.split(b"\n\n")
        ids = [f"{told}{mark}{number}" if told else "" for number in range(1, len(events) + 1)]
        if mark == "~":
            ids[-1] = told
        return b"".join(b"id: %b\n%b\n\n" % (ids[at].encode(), events[at]) for at in range(had, len(events)))
