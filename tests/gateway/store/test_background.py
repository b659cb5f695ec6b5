"""A whole gateway whose watch on keys, or whose ledger, meets what nobody thought of."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.key_cache import BLIND_S
from synthia_vllm.gateway.store.keys import KeyStore
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.ready import UNBILLED_S
from synthia_vllm.gateway.store.tables import Entry
from tests.gateway.store.conftest import MakeExchange
from tests.gateway.whole import CHAT, House, house

_PATIENCE_S = 15.0  # far less than an unwatched key is believed
Fail = Callable[[str, int], None]


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fail]:
    """Has so many threads of a name not start, as where a process may have no more."""
    left: dict[str, int] = {}
    start = threading.Thread.start

    def start_or_not(thread: threading.Thread) -> None:
        for name, count in left.items():
            if thread.name.startswith(name) and count:
                left[name] = count - 1
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)
    yield left.__setitem__
    assert not any(left.values())  # it did happen


async def until(holds: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(_PATIENCE_S):
        while not (found := await holds()):
            await asyncio.sleep(0.05)
        return found


def revoke(store: KeyStore, user: str) -> None:
    (key_id,) = [key["id"] for key in store.list_keys() if key["user"] == user]
    store.revoke(key_id)


def _raise(surprises: list[Exception]) -> None:
    if surprises:
        raise surprises.pop()


def rows(found: House) -> list[str]:
    with Session(found.gateway.keys.engine) as session:
        return list(session.scalars(select(Entry.id).order_by(Entry.id)))


async def page(found: House) -> dict[str, float]:
    """The samples without labels, and those of background tasks."""
    reply = await found.get("root", "/metrics")
    assert reply.status == 200
    lines = [line for line in reply.body.decode().splitlines() if line.startswith("synthia_")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def test_no_thread_for_the_key_watch_and_a_revoked_key_ends_all_the_same(tmp_path: Path, no_thread: Fail) -> None:
    no_thread("keys-watch", 3)
    async with house(tmp_path) as found:
        assert (await found.post("alice", CHAT)).status == 200
        elsewhere = open_database(f"sqlite:///{tmp_path}/keys.db")
        revoke(KeyStore(elsewhere, b""), "alice")

        async def refused() -> bool:
            return (await found.post("alice", CHAT)).status == 401

        await until(refused)
        elsewhere.dispose()


async def test_a_surprise_in_the_key_watch_is_counted_and_a_revoked_key_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surprises: list[Exception] = [OverflowError("int too large"), KeyError("number")]
    asked = KeyStore.revision
    monkeypatch.setattr(KeyStore, "revision", lambda store: _raise(surprises) or asked(store))
    async with house(tmp_path) as found:
        found.keys["root"] = found.gateway.keys.create("root", admin=True)[1]
        before = (await page(found))['synthia_background_restarts_total{task="key_watch"}']
        assert (await found.post("alice", CHAT)).status == 200

        async def tried() -> bool:
            return not surprises

        await until(tried)
        revoke(found.gateway.keys, "alice")

        async def refused() -> bool:
            return (await found.post("alice", CHAT)).status == 401

        await until(refused)
        after = (await page(found))['synthia_background_restarts_total{task="key_watch"}']
        assert after - before in (1, 2)  # the first may have come before the page


async def test_no_thread_for_the_ledger_and_its_rows_are_written_all_the_same(tmp_path: Path, no_thread: Fail) -> None:
    async with house(tmp_path) as found:
        no_thread("ledger", 3)
        assert (await found.post("alice", CHAT)).status == 200

        async def written() -> bool:
            return found.gateway.ledger.waiting == 0

        await until(written)
        assert len(rows(found)) == 1


@pytest.mark.parametrize(
    "poison",
    [{"generated": 2**63}, {"model": "a\ud800"}, {"status": None}],
    ids=["over 63 bits", "half a character", "no value"],
)
async def test_one_row_that_no_database_takes_holds_up_no_other_and_is_told(
    url: str, make_exchange: MakeExchange, poison: dict[str, Any]
) -> None:
    ledger = Ledger(engine := open_database(url))
    for number in range(40):
        ledger.add(make_exchange(f"{number:02d}", **(poison if number == 17 else {})))
    with capture_logs() as logs:
        assert await asyncio.to_thread(ledger.flush)
    with Session(engine) as session:
        assert list(session.scalars(select(Entry.id).order_by(Entry.id))) == [f"{n:02d}" for n in range(40) if n != 17]
    assert (ledger.lost, ledger.waiting, ledger.failing) == (1, 0, False)
    assert [(line["event"], line["row"]["id"]) for line in logs] == [("ledger_row_refused", "17")]
    ledger.close()
    engine.dispose()


async def test_a_ledger_that_nobody_writes_is_failing(url: str) -> None:
    skipped = 0.0
    ledger = Ledger(engine := open_database(url), clock=lambda: time.monotonic() + skipped)
    assert not ledger.failing
    skipped = 60.0
    assert ledger.failing
    assert ledger.flush()
    assert not ledger.failing
    ledger.close()
    engine.dispose()


async def test_ready_tells_when_keys_or_bill_were_not_kept_for_long(tmp_path: Path) -> None:
    async with house(tmp_path) as found:
        assert (await found.get("nobody", "/ready")).status == 200
        cache, ledger = found.gateway.key_cache, found.gateway.ledger
        for task in found.gateway._tasks:
            task.cancel()  # the worst that can come to them
        for owner, bound, word in ((cache, BLIND_S, "keys"), (ledger, UNBILLED_S, "ledger")):
            clock = owner._clock
            owner._clock = lambda clock=clock, bound=bound: clock() + bound + 1  # type: ignore[misc]
            reply = await found.get("nobody", "/ready")
            assert reply.status == 503
            assert word in reply.body.decode()
            owner._clock = clock
        assert (await found.get("nobody", "/ready")).status == 200


async def test_a_revoked_key_is_refused_once_the_watch_has_long_been_dead(tmp_path: Path) -> None:
    async with house(tmp_path) as found:
        assert (await found.post("alice", CHAT)).status == 200
        found.gateway._tasks[0].cancel()
        revoke(found.gateway.keys, "alice")
        cache = found.gateway.key_cache
        clock = cache._clock
        cache._clock = lambda: clock() + BLIND_S + 1
        assert (await found.post("alice", CHAT)).status == 401
