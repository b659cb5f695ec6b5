import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, event, func, select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.ledger import INTERVAL_S, Ledger
from synthia_vllm.gateway.store.tables import Entry, Writer
from synthia_vllm.gateway.store.usage import gaps, spent_tokens
from tests.gateway.store.conftest import MakeExchange
from tests.services import Postgres

LOST_AT_MOST_S = 1.0  # the bound: rows of the last second


def ids(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Entry.id).order_by(Entry.id)))


@contextmanager
def slow_inserts(engine: Engine, seconds: float) -> Iterator[threading.Event]:
    """Makes writing slow; the event is set once a batch is on its way."""
    begun = threading.Event()

    def wait(conn: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO ledger"):
            begun.set()
            time.sleep(seconds)

    event.listen(engine, "before_cursor_execute", wait)
    yield begun
    event.remove(engine, "before_cursor_execute", wait)


def test_an_exchange_becomes_a_row(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    exchange = make_exchange("a", prompt=100, generated=23, arrived_at=1_800_000_000.25)
    exchange.usage.first_token = exchange.arrived + 0.1
    exchange.first_sent = exchange.arrived + 0.5
    ledger.add(exchange)
    assert ledger.flush()
    with Session(engine) as session:
        row = session.scalars(select(Entry)).one()
        assert (row.id, row.user, row.key_id, row.model, row.status) == ("a", "alice", "k", "synthia", 200)
        assert (row.prompt_tokens, row.generated_tokens, row.outcome) == (100, 23, "finished")
        assert row.arrived_at == 1_800_000_000.25
        assert row.time_to_first_token == pytest.approx(0.5)
    ledger.close()


def test_a_row_written_twice_is_there_once_and_unchanged(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    ledger.add(make_exchange("a", generated=5))
    assert ledger.flush()
    for _ in range(2):
        ledger.add(make_exchange("a", generated=99))  # the second within one batch
    ledger.add(make_exchange("b", generated=1))
    assert ledger.flush()
    assert ids(engine) == ["a", "b"]
    assert spent_tokens(engine, "alice", 0) == (10 + 5) + (10 + 1)
    ledger.close()


def test_a_rejected_request_is_recorded_and_costs_nothing(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    ledger.add(make_exchange("a", prompt=900, outcome="rejected", status=429, reason="tokens_per_minute"))
    ledger.close()
    with Session(engine) as session:
        row = session.scalars(select(Entry)).one()
        assert (row.outcome, row.reason, row.status) == ("rejected", "tokens_per_minute", 429)
        assert (row.prompt_tokens, row.generated_tokens) == (0, 0)


def test_what_generates_nothing_is_no_row(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    exchange = make_exchange("a")
    exchange.request = None
    ledger.ended(exchange)
    ledger.ended(make_exchange("b"))
    ledger.close()
    assert ids(engine) == ["b"]


def test_many_rows_go_in_a_few_statements(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    for number in range(2500):
        ledger.add(make_exchange(f"{number:05d}"))
    statements: list[str] = []

    def note(conn: object, cursor: object, statement: str, parameters: object, context: object, many: bool) -> None:
        if statement.startswith("INSERT INTO ledger"):
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    assert ledger.flush()
    event.remove(engine, "before_cursor_execute", note)
    assert len(ids(engine)) == 2500
    assert len(statements) <= 25
    ledger.close()


async def test_the_task_writes_beside_the_requests(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine, interval=0.05)
    task = asyncio.create_task(ledger.run())
    ledger.add(make_exchange("a"))
    deadline = time.monotonic() + 5
    while not ids(engine) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert ids(engine) == ["a"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    ledger.close()


def test_closing_writes_the_rest_and_leaves_no_gap(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    ledger.add(make_exchange("a"))
    ledger.close()
    assert ids(engine) == ["a"]
    with capture_logs() as logs:
        Ledger(engine).close()
    assert logs == []
    assert gaps(engine) == []


def test_rows_are_kept_while_the_database_is_gone(postgres: Postgres, make_exchange: MakeExchange) -> None:
    engine = open_database(postgres.new_database())
    ledger = Ledger(engine)
    with capture_logs() as logs:
        postgres.stop()
        try:
            for number in range(3):
                ledger.add(make_exchange(f"{number}"))
                assert not ledger.flush()
        finally:
            postgres.start()
        assert ledger.flush()
    assert ids(engine) == ["0", "1", "2"]
    assert ledger.lost == 0
    assert [line["event"] for line in logs] == ["ledger_failing", "ledger_writing_again"]
    ledger.close()
    engine.dispose()


def test_the_oldest_rows_go_where_too_many_wait(
    engine: Engine, make_exchange: MakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthia_vllm.gateway.store.ledger._MOST_WAITING", 3)
    ledger = Ledger(engine)
    for name in "abcde":
        ledger.add(make_exchange(name))
    assert ledger.lost == 2
    ledger.close()
    assert ids(engine) == ["c", "d", "e"]


_WRITER = """
import asyncio, sys, time
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.request import Exchange
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.ledger import Ledger

async def main():
    ledger = Ledger(open_database(sys.argv[1]))
    task = asyncio.create_task(ledger.run())
    number = 0
    while True:
        one = Exchange(id=f"{number:06d}", request_id="r", route="/v1/chat/completions", account=Account("alice"))
        one.status, one.outcome = 200, "finished"
        ledger.add(one)
        print(one.id, one.arrived_at, flush=True)
        number += 1
        await asyncio.sleep(0.01)

asyncio.run(main())
"""


def test_a_killed_writer_loses_the_last_second_at_most_and_it_is_told(url: str, engine: Engine) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    added: dict[str, float] = {}
    begun = None
    for line in process.stdout:
        name, arrived = line.split()
        begun = begun or float(arrived)
        added[name] = float(arrived)
        if float(arrived) > begun + 2:
            break
    killed = time.time()
    process.kill()
    for line in process.stdout.read().splitlines():
        if len(line.split()) == 2:
            added[line.split()[0]] = float(line.split()[1])
    process.wait()

    written = set(ids(engine))
    assert written
    assert not [name for name, arrived in added.items() if arrived < killed - LOST_AT_MOST_S and name not in written]
    assert gaps(engine) == []  # nobody has looked yet
    with capture_logs() as logs:
        Ledger(engine).close()
    assert [line["event"] for line in logs] == ["ledger_gap"]
    (gap,) = gaps(engine)
    assert killed - LOST_AT_MOST_S - INTERVAL_S <= gap.since <= killed + 0.5
    missing = [arrived for name, arrived in added.items() if name not in written]
    assert all(gap.since - LOST_AT_MOST_S <= arrived <= gap.until for arrived in missing)
    assert gaps(engine, since=gap.until + 1) == []
    with capture_logs() as logs:
        Ledger(engine).close()
    assert logs == []  # told once


def test_a_writer_that_runs_is_no_gap(engine: Engine) -> None:
    first = Ledger(engine)
    with capture_logs() as logs:
        second = Ledger(engine)
    assert logs == []
    first.close()
    second.close()


def test_a_writer_that_nobody_reaped_is_a_gap(url: str, engine: Engine) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    time.sleep(0.5)  # dead, not waited for: what a container without an init leaves
    try:
        Ledger(engine).close()
        assert len(gaps(engine)) == 1
    finally:
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("late", [0, 3])
async def test_closing_while_a_batch_is_written_ends_well(
    engine: Engine, make_exchange: MakeExchange, late: int
) -> None:
    """What the gateway does at its end: cancel `run`, then close."""
    ledger = Ledger(engine, interval=0.01)
    for number in range(10):
        ledger.add(make_exchange(f"early-{number}"))
    with slow_inserts(engine, 0.4) as begun:
        task = asyncio.create_task(ledger.run())
        assert await asyncio.to_thread(begun.wait, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for number in range(late):
            ledger.add(make_exchange(f"late-{number}"))
        await asyncio.to_thread(ledger.close)
    assert len(ids(engine)) == 10 + late
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Writer).where(Writer.ended.is_(None))) == 0


def test_rows_that_come_while_a_full_queue_is_written_are_kept(
    engine: Engine, make_exchange: MakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthia_vllm.gateway.store.ledger._MOST_WAITING", 5)
    ledger = Ledger(engine)
    for number in range(5):
        ledger.add(make_exchange(f"early-{number}"))
    with slow_inserts(engine, 0.4) as begun:
        writing = threading.Thread(target=ledger.flush)
        writing.start()
        assert begun.wait(5)
        for number in range(3):
            ledger.add(make_exchange(f"late-{number}"))
        writing.join()
    ledger.close()
    assert {"late-0", "late-1", "late-2"} <= set(ids(engine))


def test_one_row_that_the_database_refuses_does_not_hold_up_the_others(
    engine: Engine, make_exchange: MakeExchange
) -> None:
    """`{"model": "a\\u0000"}` is JSON that any client can send, and no text for PostgreSQL."""
    ledger = Ledger(engine)
    ledger.add(make_exchange("bad", model="a\0"))
    ledger.add(make_exchange("good"))
    ledger.flush()
    assert "good" in ids(engine)
