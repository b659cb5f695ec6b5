"""The bill: one row a request, written beside the request path in batches."""

import asyncio
import os
import platform
import threading
import time
from collections import deque
from typing import Any
from uuid import uuid4

import psutil
import structlog
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from synthia_vllm.gateway.request import Exchange, Observer
from synthia_vllm.gateway.store.database import insert_or_ignore
from synthia_vllm.gateway.store.tables import Entry, Writer

INTERVAL_S = 0.5
_MOST_WAITING = 100_000
_BATCH = 1000
_SILENCE_S = 600.0  # after which a writer on another host counts as gone
_PAUSE_S = 5.0  # most between two tries while the database is gone

_log = structlog.get_logger(__name__)


class Ledger(Observer):
    """An observer that takes requests as they end and writes them each half second; a row written twice is there once.

    A process that is killed loses what it had not written: the rows of the last half second. The next one to start
    finds out by the writer's row that never ended, logs `ledger_gap`, and marks it for `usage` to tell.
    """

    def __init__(self, engine: Engine, *, interval: float = INTERVAL_S) -> None:
        self.lost = 0  # rows dropped because the database was gone for too long
        self.failing = False  # the database did not take the last batch
        self._engine = engine
        self._interval = interval
        self._waiting: deque[dict[str, Any]] = deque()
        self._batch: list[dict[str, Any]] = []  # being written
        self._writing = threading.Lock()  # the thread of `run` may still write when `close` does
        self._id = uuid4().hex
        self._open()

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return len(self._waiting) + len(self._batch)

    def ended(self, exchange: Exchange) -> None:
        """Notes a request that generates, when it has ended. Never waits."""
        if exchange.request is not None:
            self.add(exchange)

    def add(self, exchange: Exchange) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(row_of(exchange))

    async def run(self) -> None:
        """Writes until it is cancelled."""
        pause = self._interval
        while True:
            await asyncio.sleep(pause)
            written = await asyncio.to_thread(self.flush)
            pause = self._interval if written else min(_PAUSE_S, 2 * pause)

    def flush(self) -> bool:
        """Writes what waits; False if the database did not take it."""
        with self._writing:
            try:
                while self._write():
                    pass
            except SQLAlchemyError as error:
                if not self.failing:
                    _log.error("ledger_failing", waiting=self.waiting, error=str(error).splitlines()[0])
                self.failing = True
                return False
            if self.failing:
                _log.info("ledger_writing_again", lost=self.lost)
            self.failing = False
            return True

    def close(self) -> None:
        """Writes the rest and says that nothing is missing."""
        if self.flush():
            with Session(self._engine) as session, session.begin():
                session.execute(update(Writer).where(Writer.id == self._id).values(ended=time.time()))
        else:
            _log.error("ledger_rows_lost", rows=self.waiting)

    def _write(self) -> bool:
        """One batch; True if there may be more. A batch that fails is kept and tried again."""
        while self._waiting and len(self._batch) < _BATCH:
            self._batch.append(self._waiting.popleft())
        rows = self._batch
        with Session(self._engine) as session, session.begin():
            if rows:
                session.execute(insert_or_ignore(self._engine, Entry, "id"), rows)
            session.execute(update(Writer).where(Writer.id == self._id).values(last_flush=time.time()))
        self._batch = []
        return bool(self._waiting)

    def _open(self) -> None:
        """Enters this writer, and finds those that ended without a word."""
        host, now = platform.node(), time.time()
        with Session(self._engine) as session, session.begin():
            for writer in session.scalars(select(Writer).where(Writer.ended.is_(None))):
                if _alive(writer) if writer.host == host else now - writer.last_flush < _SILENCE_S:
                    continue
                writer.ended, writer.gap = now, True
                _log.warning("ledger_gap", writer=writer.id, pid=writer.pid, rows_missing_after=writer.last_flush)
            session.execute(
                insert(Writer).values(id=self._id, host=host, pid=os.getpid(), started=now, last_flush=now, gap=False)
            )


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
