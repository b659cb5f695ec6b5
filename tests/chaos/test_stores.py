"""What the gateway writes to and counts in goes away under load: a full disk, a PostgreSQL or a Redis that is gone."""

import asyncio
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from synthia_vllm.bench.checked_stream import COMPLETIONS, CheckedStream, numbered, run_stream
from synthia_vllm.bench.replica_set import ReplicaSet
from synthia_vllm.free_ports import free_port
from synthia_vllm.gateway.store import ledger as ledger_module
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.ledger import INTERVAL_S, Ledger
from synthia_vllm.gateway.store.tables import Entry
from synthia_vllm.gateway.store.usage import gaps
from tests.chaos.house import BOUND_S, STREAMS, House, assert_whole, house, until
from tests.chaos.network import BlackHole, Impossible, need_root
from tests.chaos.test_gateway import gateway
from tests.redis_service import RedisServer
from tests.services import Postgres

pytestmark = pytest.mark.chaos


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 4 MiB with the gateway's data in it."""
    need_root("mount", "umount")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    monkeypatch.setenv("SYNTHIA_DATA", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Takes all that is left of the disk."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                pass
    return filler


def rows(url: str | None = None) -> int:
    database = open_database(url)
    with Session(database) as session:
        count = session.scalar(select(func.count()).select_from(Entry))
    database.dispose()
    return int(count or 0)


async def fail_to_write(running: House) -> int:
    """Loads until the ledger has noticed; returns how many loads it took."""
    rounds = 0
    while not running.gateway.ledger.failing and rounds < 20:
        assert_whole(await running.load(STREAMS, 4))
        rounds += 1
    await until(lambda: running.gateway.ledger.failing)
    return rounds


async def test_a_full_disk_stops_nobody_and_loses_no_row(small_disk: Path, replicas: ReplicaSet) -> None:
    with capture_logs() as logs:
        async with house(replicas) as running:
            filler = fill(small_disk)
            rounds = await fail_to_write(running)
            assert_whole(await running.load())
            filler.unlink()
            await until(lambda: not running.gateway.ledger.failing)
            await running.calm()
            await asyncio.to_thread(running.gateway.ledger.flush)
            assert running.gateway.ledger.lost == 0
    told = [entry["event"] for entry in logs if entry["event"].startswith("ledger")]
    assert told == ["ledger_failing", "ledger_writing_again"]  # once each, not for each try
    assert rows() == (rounds + 1) * STREAMS


async def test_a_disk_full_for_too_long_loses_rows_and_says_so(
    small_disk: Path, replicas: ReplicaSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_WAITING", STREAMS // 2)
    with capture_logs() as logs:
        async with house(replicas) as running:
            filler = fill(small_disk)
            await fail_to_write(running)
            for _ in range(3):
                assert_whole(await running.load(STREAMS, 4))
            filler.unlink()
            await until(lambda: not running.gateway.ledger.failing)
            await running.calm()
            lost = running.gateway.ledger.lost
    assert lost > 0
    assert [entry["lost"] for entry in logs if entry["event"] == "ledger_writing_again"] == [lost]


async def test_a_gateway_that_ends_on_a_full_disk_leaves_word(small_disk: Path, replicas: ReplicaSet) -> None:
    with capture_logs() as logs:
        async with house(replicas) as running:
            filler = fill(small_disk)
            await fail_to_write(running)
        assert "ledger_rows_lost" in [entry["event"] for entry in logs]
        filler.unlink()
        async with house(replicas) as running:
            assert_whole(await running.load())
            await running.calm()


@pytest.fixture
def hole(postgres: Postgres) -> Iterator[BlackHole]:
    """Closed; open, no packet reaches PostgreSQL, and none comes from it."""
    need_root("nft")
    found = BlackHole(postgres.port)
    try:
        found.open()
    except Impossible as error:
        pytest.skip(f"no packet filter here: {error}")
    try:
        found.close()
        yield found
    finally:
        found.close()


async def test_postgres_falls_into_a_black_hole_and_another_takes_its_place(
    hole: BlackHole, postgres: Postgres, replicas: ReplicaSet
) -> None:
    url = postgres.new_database()
    with capture_logs() as logs:
        async with house(replicas, access={"database": url}) as running:
            ledger = running.gateway.ledger
            assert_whole(await running.load(STREAMS, 4))
            await until(lambda: ledger.waiting == 0)
            with ExitStack() as used:  # as after a busy while: the ledger's next connection is an open one
                for _ in range(4):
                    used.enter_context(running.gateway.keys.engine.connect())
            hole.open()
            assert_whole(await running.load(STREAMS, 4))
            await until(lambda: ledger.failing)
            assert_whole(await running.load(STREAMS, 4))  # nobody waits for the bill
            assert ledger.waiting == 2 * STREAMS
            postgres.stop()
            hole.close()
            postgres.start()  # at the same address, and knows of no connection
            await until(lambda: ledger.waiting == 0 and not ledger.failing)
            await running.calm()
            assert ledger.lost == 0
    assert rows(url) == 3 * STREAMS
    told = [entry["event"] for entry in logs if entry["event"].startswith("ledger")]
    assert told == ["ledger_failing", "ledger_writing_again"]


async def test_a_gateway_ends_although_postgres_is_in_a_black_hole_and_tells_what_is_lost(
    hole: BlackHole, postgres: Postgres, replicas: ReplicaSet, tmp_path: Path
) -> None:
    url = postgres.new_database()
    port, log = free_port(), tmp_path / "gateway.log"
    wanted = [numbered(COMPLETIONS, f"{number}: what is an orca?", 4) for number in range(STREAMS)]
    words = ["--access.database", url, "--limits.concurrent-requests", "100000"]
    with gateway(port, replicas, log, *words) as process:
        hole.open()
        assert_whole(await asyncio.gather(*(run_stream(f"http://127.0.0.1:{port}", one) for one in wanted)))
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, BOUND_S)  # the hole is open all the while
        assert re.search(rf"ledger_rows_lost +rows={STREAMS}\n", log.read_text())
        hole.close()
    with capture_logs() as logs:
        Ledger(database := open_database(url)).close()
        assert [entry["event"] for entry in logs] == ["ledger_gap"]
        assert rows(url) == 0
    database.dispose()


@asynccontextmanager
async def streaming(
    replicas: ReplicaSet, log: Path, *words: str
) -> AsyncIterator[tuple["subprocess.Popen[bytes]", "asyncio.Task[list[CheckedStream]]"]]:
    """A gateway in the midst of long streams, of each of which the client has had something."""
    port = free_port()
    wanted = [numbered(COMPLETIONS, f"{number}: what is an orca?", 4000, ignore_eos=True) for number in range(STREAMS)]
    with gateway(port, replicas, log, "--limits.concurrent-requests", "100000", *words) as process:
        streams = [CheckedStream(one, f"127.0.0.1:{port}") for one in wanted]
        loop = asyncio.get_running_loop()
        for one in streams:
            await loop.create_connection(lambda one=one: one, "127.0.0.1", port)  # type: ignore[misc]
        await until(lambda: all(len(one.times) > 5 for one in streams))

        async def ended() -> list[CheckedStream]:
            await asyncio.gather(*(one.ended for one in streams))
            return streams

        yield process, asyncio.create_task(ended())


def bill() -> list[Entry]:
    database = open_database()
    with Session(database, expire_on_commit=False) as session:
        found = list(session.scalars(select(Entry)))
    database.dispose()
    return found


async def test_a_second_sigterm_cuts_streams_and_bills_what_was_delivered(replicas: ReplicaSet, tmp_path: Path) -> None:
    async with streaming(replicas, tmp_path / "gateway.log") as (process, ended):
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        streams = await ended
        assert await asyncio.to_thread(process.wait, BOUND_S) == 1
    found = bill()
    assert [row.outcome for row in found] == ["stopped"] * STREAMS
    delivered = sum(len(one.times) for one in streams)
    assert sum(row.generated_tokens for row in found) >= delivered > 5 * STREAMS
    with capture_logs() as logs:
        Ledger(database := open_database()).close()
    database.dispose()
    assert logs == []  # no gap: nothing is missing


async def test_kill_9_leaves_a_gap_that_says_how_much(replicas: ReplicaSet, tmp_path: Path) -> None:
    async with streaming(replicas, tmp_path / "gateway.log") as (process, ended):
        await asyncio.sleep(2 * INTERVAL_S)
        process.kill()
        streams = await ended
    assert rows() == 0
    delivered = sum(len(one.times) for one in streams)
    with capture_logs() as logs:
        Ledger(database := open_database()).close()
    (gap,) = gaps(database)
    database.dispose()
    assert (logs[0]["event"], logs[0]["requests"]) == ("ledger_gap", STREAMS)
    assert gap.requests == STREAMS
    assert delivered / 2 < gap.tokens <= delivered + sum(one.wanted.tokens for one in streams)
    assert gap.tokens_most >= delivered


async def test_redis_restarts(replicas: ReplicaSet, redis_server: RedisServer, redis_url: str) -> None:
    async with house(replicas, limits={"concurrent_requests": 100_000, "redis": redis_url}) as running:
        first = running.load()
        await running.busy()
        redis_server.stop()
        second = running.load(STREAMS // 2)  # counted here while Redis is away
        await running.busy(STREAMS)
        redis_server.start()
        third = running.load(STREAMS // 2)
        replicas.kill(running.busiest())
        for streams in (first, second, third):
            assert_whole(await streams)
        await running.calm()
