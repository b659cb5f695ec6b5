"""The journal in Redis: written in batches beside the streams, read when a client comes back."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import msgspec
import structlog
from prometheus_client import Counter

from synthia_vllm.errors import Overloaded, ReplyNotKept
from synthia_vllm.gateway.journal.entry import Entry
from synthia_vllm.gateway.request import Exchange, Usage
from synthia_vllm.redis_client import REDIS_GONE, open_redis

PERIOD_S = 0.05  # between two writes
_ALIVE_S = 1.0  # between two words of a reply of which nothing new is there
_RETRY_S = 0.5  # while Redis is gone
_MOST_LATE = 4096
_KEPT, _MISSING, _OTHER = "k", "m", "o"  # as in journal.lua

TAKEN_UP = Counter(
    "synthia_replies_taken_up_total",
    "Clients that came back for the rest of a reply, by what became of it.",
    ["result"],  # resumed, finished, not_kept
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A reply that now belongs to who claimed it."""

    entry: Entry
    before: str  # the exchange that had it
    closed: bool  # and was done with it: its client had left, or it was whole


class Journals:
    """Keeps what is generated of the replies under way, a twentieth of a second behind them.

    Who comes back claims a reply: from then on it belongs to that exchange, and the one before, if it is alive, learns
    it with its next write, ends its generation and bills nothing. While Redis is gone, streams go on and only their
    events have no ids once it is behind by more than they carry; Redis that comes back empty is told all of it again.
    """

    def __init__(self, url: str, *, keep_s: float, timeout: float = 1.0) -> None:
        self._redis = open_redis(url, timeout)
        self._script = self._redis.register_script(files(__package__).joinpath("journal.lua").read_text())
        self._keep_s = max(1, round(keep_s))
        self._open: dict[Entry, float] = {}  # when it was written last, by `time.monotonic`
        self._late: dict[Entry, Usage] = {}  # ended while Redis was gone
        self._ending: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._lost = False

    def entry(self, exchange: Exchange, digest: str) -> Entry:
        """For a reply that begins."""
        name = name_of(exchange.account.user, exchange.request_id)
        return Entry(name, exchange.id, exchange.id, int(exchange.arrived_at), digest)

    async def claim(self, exchange: Exchange, digest: str, *, alive: bool) -> Found | None:
        """The reply of this user and name, which is this exchange's from now on; None where there is none.

        `alive`: also one that another exchange still generates. Raises ReplyNotKept where the name is of a request
        with another body, Overloaded where Redis is gone.
        """
        name = name_of(exchange.account.user, exchange.request_id)
        try:
            if self._lost:
                raise TimeoutError  # asked after by `run`
            answer = await self._call("claim", [name], exchange.id, digest, int(alive))
        except REDIS_GONE as error:
            self._tell_lost(error)
            raise Overloaded("what is kept of this reply can't be asked for now", 1.0) from None
        state, *rest = [word.decode() for word in answer]
        if state == "other":
            raise ReplyNotKept("another request of yours has this X-Request-Id")
        if state != "ok":
            return None
        before, run, created, closed, settled, prompt, *records = rest
        entry = Entry(
            name,
            exchange.id,
            run,
            int(created),
            digest,
            records=records,
            kept=len(records),
            known=True,
            settled=int(settled),
            prompt_settled=prompt == "1",
        )
        return Found(entry, before, closed == "1")

    def begin(self, entry: Entry) -> None:
        """Writes it from now on, with each period's other replies."""
        self._open[entry] = 0.0

    async def close(self, entry: Entry, usage: Usage) -> None:
        """Says that the engine is done with it, and what it is billed for: nothing where another goes on with it.

        To its end, also where this is cancelled: what is billed here must be known there.
        """
        self._open.pop(entry, None)
        task = asyncio.create_task(self._end(entry, usage))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)

    async def forget(self, entry: Entry) -> None:
        """The client has all of it, and can't come back for more."""
        if not self._lost and not entry.lost and not entry.taken:
            try:
                async with self._writing:  # a write that is under way would bring it back
                    await self._call("forget", [entry.name], entry.owner)
            except REDIS_GONE as error:
                self._tell_lost(error)

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            await asyncio.sleep(_RETRY_S if self._lost else PERIOD_S)
            try:
                await self.write()
            except REDIS_GONE as error:
                self._tell_lost(error)

    async def write(self) -> None:
        """Writes what is new of all replies."""
        now = time.monotonic()
        due = [
            entry
            for entry, at in self._open.items()
            if not entry.lost and (entry.kept < len(entry.records) or now - at >= _ALIVE_S)
        ]
        if due:
            lengths = [len(entry.records) for entry in due]
            async with self._writing:
                answers = await self._call("append", [entry.name for entry in due], _written(due))
            for entry, length, answer in zip(due, lengths, answers.decode(), strict=True):
                self._note(entry, length, answer)
                if entry in self._open:
                    self._open[entry] = now
        elif self._lost:
            await self._redis.ping()
        if self._lost:
            self._lost = False
            _log.warning("journal_back")
        for entry, usage in list(self._late.items()):
            await self._close(entry, usage)
            self._late.pop(entry, None)

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def _end(self, entry: Entry, usage: Usage) -> None:
        if not entry.taken and not entry.lost:
            try:
                if self._lost:
                    raise TimeoutError  # asked after by `run`
                await self._close(entry, usage)
            except REDIS_GONE as error:
                self._tell_lost(error)
                if entry.known and len(self._late) < _MOST_LATE:
                    self._late[entry] = usage
        usage.taken = entry.taken

    async def _close(self, entry: Entry, usage: Usage) -> None:
        generated = max(usage.generated, entry.settled) if usage.accepted else entry.settled
        settled = str(generated), str(int(usage.accepted or entry.prompt_settled))
        length = len(entry.records)
        answer = await self._call("close", [entry.name], _written([entry]), *settled)
        self._note(entry, length, answer.decode())

    def _note(self, entry: Entry, length: int, answer: str) -> None:
        """`answer`: a letter, as in journal.lua."""
        if answer == _KEPT:
            entry.known, entry.kept = True, length
        elif answer == _MISSING:
            entry.kept = 0
        elif answer == _OTHER:
            entry.lost = True
        elif not entry.taken:
            entry.taken = True
            entry.on_taken()

    async def _call(self, operation: str, names: Sequence[str], *words: str | int | bytes) -> Any:
        return await self._script(keys=names, args=[operation, self._keep_s, *words])

    def _tell_lost(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            _log.error("journal_lost", error=f"{type(error).__name__}: {error}")


def name_of(user: str, request_id: str) -> str:
    """Of a reply in Redis; tells nothing of who asked what."""
    digest = hashlib.blake2b(f"{user}\0{request_id}".encode(), digest_size=16).hexdigest()
    return f"{{synthia:reply:{digest}}}"


def digest_of(route: str, body: bytes) -> str:
    """What tells one request from another of the same name."""
    return hashlib.blake2b(route.encode() + b"\0" + body, digest_size=16).hexdigest()


def _written(entries: Sequence[Entry]) -> bytes:
    """What is new of them."""
    return msgspec.msgpack.encode(
        [
            (one.owner, one.run, one.created, one.digest, not one.known, one.kept, one.records[one.kept :])
            for one in entries
        ]
    )
