"""What the gateway writes to and counts in goes away under load: the disk is full, Redis restarts."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from benchmarks.replica_set import ReplicaSet
from synthia_vllm.gateway.store import ledger as ledger_module
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.tables import Entry
from tests.chaos.house import STREAMS, House, assert_whole, house, until
from tests.chaos.network import need_root
from tests.redis_service import RedisServer

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


def rows() -> int:
    database = open_database()
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
