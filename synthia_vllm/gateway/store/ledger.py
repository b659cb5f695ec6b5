"""The bill: one row a request, written beside the request path in batches."""

import asyncio
import contextlib
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psutil
import structlog
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from synthia_vllm.gateway.request import Exchange, Observer
from synthia_vllm.gateway.store.database import insert_or_ignore
from synthia_vllm.gateway.store.tables import Entry, Writer
from synthia_vllm.gateway.store.threads import DaemonThreads

INTERVAL_S = 0.5
_MOST_WAITING = 100_000
_BATCH = 1000
_SILENCE_S = 600.0  # after which a writer on another host counts as gone
_PAUSE_S = 5.0  # most between two tries while the database is gone
_IDLE_S = 3.0  # between two signs of life where there is nothing to bill
_LATE_S = 5.0  # a database that has taken nothing for longer is failing
_CLOSE_S = 5.0  # most that the end of the process waits for the last rows
_BIGGEST = 2**63 - 1  # number of a column
# What a database says of a row, not of itself: Python's own errors come from numbers and texts that no column takes.
_OF_A_ROW = (DataError, IntegrityError, ArithmeticError, ValueError, TypeError)

_log = structlog.get_logger(__name__)


class Ledger(Observer):
    """An observer that takes requests as they end and writes them each half second; a row written twice is there once.

    A process that is killed loses what it had not written: the rows of the last half second, and those of requests that
    were under way. The next one to start finds out by the writer's row that never ended, which tells how many those
    were, logs `ledger_gap`, and marks it for `usage` to tell.
    """

    def __init__(
        self, engine: Engine, *, interval: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lost = 0  # rows dropped: the database was gone for too long, or took no such row
        self._engine = engine
        self._interval = interval
        self._clock = clock
        self._waiting: deque[dict[str, Any]] = deque()
        self._batch: list[dict[str, Any]] = []  # being written
        self._under_way: dict[str, Exchange] = {}
        self._failed = False  # the database did not take the last batch
        self._overflows = False
        self._written = clock()  # when the database last took what it was given
        self._writing = threading.Lock()  # the thread of `run` may still write when `close` does
        self._thread = DaemonThreads(1, "ledger")
        self._id = uuid4().hex
        self._open()

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return len(self._waiting) + len(self._batch)

    @property
    def failing(self) -> bool:
        """The database did not take the last rows, or has not been heard of for long, as where nobody writes."""
        return self._failed or self.unwritten_s > _LATE_S

    @property
    def unwritten_s(self) -> float:
        """Seconds since the database last took what it was given."""
        return self._clock() - self._written

    def opened(self, exchange: Exchange) -> None:
        """Notes a request that may come to be billed."""
        self._under_way[exchange.id] = exchange

    def ended(self, exchange: Exchange) -> None:
        """Notes a request that generates, when it has ended. Never waits."""
        self._under_way.pop(exchange.id, None)
        if exchange.request is not None:
            self.add(exchange)

    def add(self, exchange: Exchange) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1
            if not self._overflows:
                _log.error("ledger_rows_lost", reason="too many wait", most=_MOST_WAITING)
            self._overflows = True
        self._waiting.append(row_of(exchange))

    async def run(self) -> None:
        """Writes until it is cancelled; needs to be supervised."""
        loop = asyncio.get_running_loop()
        pause = self._interval
        while True:
            await asyncio.sleep(pause)
            if not self.waiting and not self._under_way and self.unwritten_s < _IDLE_S:
                continue  # nothing would be missing, so a disk may rest
            writing = loop.run_in_executor(self._thread, self.flush)
            while not (await asyncio.wait((writing,), timeout=_LATE_S))[0]:
                if self.unwritten_s > _LATE_S:
                    self._fail("it does not answer")
            pause = self._interval if await writing else min(_PAUSE_S, 2 * pause)

    def flush(self) -> bool:
        """Writes what waits; False if the database did not take it."""
        with self._writing:
            try:
                while self._write():
                    pass
            except SQLAlchemyError as error:
                self._fail(str(error).splitlines()[0])
                return False
            except Exception as error:
                self._fail(repr(error))
                raise
            if self._failed:
                _log.info("ledger_writing_again", lost=self.lost)
            self._failed = self._overflows = False
            return True

    def close(self) -> None:
        """Writes the rest, with what is under way as far as it came, and says that nothing is missing.

        Waits some seconds at most: a database that does not answer holds up no process that is to end.
        """
        self._thread.shutdown()
        for exchange in list(self._under_way.values()):
            self.ended(exchange)
        writing = threading.Thread(target=self._finish, name="ledger-close", daemon=True)
        try:
            writing.start()
            writing.join(_CLOSE_S)
        except RuntimeError:  # no thread can be started
            self._finish()
        if self.waiting:
            _log.error("ledger_rows_lost", rows=self.waiting)

    def _fail(self, reason: str) -> None:
        if not self._failed:
            _log.error("ledger_failing", waiting=self.waiting, error=reason)
        self._failed = True

    def _finish(self) -> None:
        with contextlib.suppress(SQLAlchemyError):
            if self.flush():
                with Session(self._engine) as session, session.begin():
                    session.execute(update(Writer).where(Writer.id == self._id).values(ended=time.time()))

    def _write(self) -> bool:
        """One batch; True if there may be more. A batch that fails is kept and tried again."""
        while self._waiting and len(self._batch) < _BATCH:
            self._batch.append(self._waiting.popleft())
        self._insert(self._batch, self._state())
        self._batch = []
        self._written = self._clock()
        return bool(self._waiting)

    def _insert(self, rows: list[dict[str, Any]], state: dict[str, Any]) -> None:
        """In one transaction; where the database refuses a row, in more, until that row is alone, and given up."""
        try:
            with Session(self._engine) as session, session.begin():
                if rows:
                    session.execute(insert_or_ignore(self._engine, Entry, "id"), rows)
                session.execute(update(Writer).where(Writer.id == self._id).values(state))
        except _OF_A_ROW as error:
            if not rows:
                raise
            if len(rows) == 1:
                self._batch = [row for row in self._batch if row is not rows[0]]
                self.lost += 1
                _log.error("ledger_row_refused", error=str(error).splitlines()[0], row=rows[0])
                return
            half = len(rows) // 2
            self._insert(rows[:half], state)
            self._insert(rows[half:], state)

    def _state(self) -> dict[str, Any]:
        """What would be missing if this process ended now without a word."""
        requests = [one.request for one in list(self._under_way.values()) if one.request is not None]
        used = sum(one.usage.billed_prompt + one.usage.billed_generated for one in requests)
        most = sum(one.prompt_tokens + one.max_generated for one in requests)
        return {
            "last_flush": time.time(),
            "open_requests": len(requests),
            "open_tokens": min(used, _BIGGEST),
            "open_tokens_most": min(most, _BIGGEST),
        }

    def _open(self) -> None:
        """Enters this writer, and finds those that ended without a word."""
        host, now = platform.node(), time.time()
        with Session(self._engine) as session, session.begin():
            for writer in session.scalars(select(Writer).where(Writer.ended.is_(None))):
                if _alive(writer) if writer.host == host else now - writer.last_flush < _SILENCE_S:
                    continue
                writer.ended, writer.gap = now, True
                _log.warning(
                    "ledger_gap",
                    writer=writer.id,
                    pid=writer.pid,
                    rows_missing_after=writer.last_flush,
                    requests=writer.open_requests,
                    tokens=writer.open_tokens,
                    tokens_most=writer.open_tokens_most,
                )
            new = {"id": self._id, "host": host, "pid": os.getpid(), "started": now, "gap": False}
            session.execute(insert(Writer).values({**new, **self._state()}))


def row_of(exchange: Exchange) -> dict[str, Any]:
    """An exchange as a row of the ledger."""
    ended = exchange.ended if exchange.ended is not None else time.perf_counter()
    return {
        "id": exchange.id,
        "request_id": exchange.request_id,
        "user": exchange.account.user,
        "key_id": exchange.account.key_id,
        "model": exchange.model.replace("\0", "\ufffd")[:255],  # a client's text; PostgreSQL takes no NUL
        "route": exchange.route,
        "arrived_at": exchange.arrived_at,
        "duration": ended - exchange.arrived,
        "queue_wait": exchange.queue_wait,
        "time_to_first_token": exchange.time_to_first_token,
        "prompt_tokens": exchange.usage.billed_prompt,
        "generated_tokens": exchange.usage.billed_generated,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "reason": exchange.reason[:32],
    }


def _alive(writer: Writer) -> bool:
    """Whether the writer's process still runs; a pid that was given to another is told by its start."""
    try:
        process = psutil.Process(writer.pid)
        return bool(process.create_time() <= writer.started and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
