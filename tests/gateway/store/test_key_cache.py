import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import psutil
import pytest
from structlog.testing import capture_logs

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.key_cache import KeyCache
from synthia_vllm.gateway.store.keys import KeyStore
from tests.gateway.store.conftest import SECRET
from tests.services import Postgres

REVOKED_WITHIN_S = 2.0  # the bound


class CountingStore(KeyStore):
    asked = 0

    def find(self, presented: str) -> Account | None:
        self.asked += 1
        return super().find(presented)


@asynccontextmanager
async def watching(cache: KeyCache) -> AsyncIterator[KeyCache]:
    task = asyncio.create_task(cache.watch())
    try:
        yield cache
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cache.close()


async def eventually(true: Callable[[], Awaitable[bool]], within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if await true():
            return True
        await asyncio.sleep(0.05)
    return await true()


async def test_a_key_is_asked_for_once(store: KeyStore) -> None:
    counting = CountingStore(store.engine, SECRET)
    _, key = store.create("alice")
    cache = KeyCache(counting)
    unknown = "sk-synthia-" + "x" * 40
    for _ in range(3):
        account = await cache.lookup(key)
        assert account is not None
        assert account.user == "alice"
        assert await cache.lookup(unknown) is None
    assert counting.asked == 2
    cache.close()


async def test_what_cannot_be_a_key_never_reaches_the_database(store: KeyStore) -> None:
    counting = CountingStore(store.engine, SECRET)
    cache = KeyCache(counting)
    for text in ("", "Bearer", "sk-synthia-short", "sk-synthia-" + "é" * 40, "sk-synthia-" + "a" * 10_000):
        assert await cache.lookup(text) is None
    assert counting.asked == 0
    cache.close()


async def test_memory_is_bounded(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthia_vllm.gateway.store.key_cache._MOST", 3)
    counting = CountingStore(store.engine, SECRET)
    cache = KeyCache(counting)
    keys = [f"sk-synthia-{number:040d}" for number in range(5)]
    for key in keys:
        await cache.lookup(key)
    await cache.lookup(keys[-1])
    assert counting.asked == 5
    await cache.lookup(keys[0])
    assert counting.asked == 6
    cache.close()


async def test_revoking_is_seen_by_another_cache(url: str, store: KeyStore) -> None:
    key_id, key = store.create("alice")
    other = open_database(url)
    async with watching(KeyCache(KeyStore(other, SECRET))) as cache:
        assert await cache.lookup(key) is not None
        await asyncio.sleep(0.3)
        assert await cache.lookup(key) is not None
        store.revoke(key_id)

        async def refused() -> bool:
            return await cache.lookup(key) is None

        assert await eventually(refused, REVOKED_WITHIN_S)
    other.dispose()


async def test_a_database_that_takes_too_long_is_an_error_of_ours(store: KeyStore) -> None:
    class Slow(KeyStore):
        def find(self, presented: str) -> Account | None:
            time.sleep(0.5)
            return super().find(presented)

    _, key = store.create("alice")
    hasty, patient = (KeyCache(Slow(store.engine, SECRET), answer_s=seconds) for seconds in (0.05, 60.0))
    with pytest.raises(Overloaded, match="can't be looked up now"):
        await hasty.lookup(key)
    account = await patient.lookup(key)
    assert account is not None
    assert account.user == "alice"
    for cache in (hasty, patient):
        cache.close()


async def test_a_change_of_the_user_is_seen_too(store: KeyStore) -> None:
    _, key = store.create("alice")
    async with watching(KeyCache(store)) as cache:
        assert await cache.lookup(key) is not None
        store.create("alice", weight=7.0)

        async def changed() -> bool:
            account = await cache.lookup(key)
            return account is not None and account.weight == 7.0

        assert await eventually(changed, REVOKED_WITHIN_S)


async def test_an_expired_key_is_refused_from_memory_too(store: KeyStore) -> None:
    _, key = store.create("alice", expires=time.time() + 0.5)
    cache = KeyCache(store)
    assert await cache.lookup(key) is not None
    await asyncio.sleep(0.6)
    assert await cache.lookup(key) is None
    cache.close()


async def test_known_keys_outlive_a_lost_database_for_a_minute(postgres: Postgres) -> None:
    engine = open_database(postgres.new_database())
    store = KeyStore(engine, SECRET)
    _, key = store.create("alice")
    skipped = 0.0
    with capture_logs() as logs:
        async with watching(KeyCache(store, clock=lambda: time.monotonic() + skipped)) as cache:
            await asyncio.sleep(0.3)  # the first poll forgets what was asked before it
            assert await cache.lookup(key) is not None
            postgres.stop()
            try:
                await asyncio.sleep(2.5)
                assert await cache.lookup(key) is not None
                with pytest.raises(Overloaded):
                    await cache.lookup("sk-synthia-" + "y" * 40)
                skipped = 61.0

                async def forgotten() -> bool:
                    try:
                        return await cache.lookup(key) is None
                    except Overloaded:
                        return True

                assert await eventually(forgotten, 5)
            finally:
                postgres.start()

            async def back() -> bool:
                return not await forgotten()

            assert await eventually(back, 5)
    assert [line["event"] for line in logs].count("key_database_lost") == 1
    engine.dispose()


async def test_known_keys_are_forgotten_where_the_database_hangs(postgres: Postgres) -> None:
    engine = open_database(postgres.new_database())
    store = KeyStore(engine, SECRET)
    _, key = store.create("alice")
    skipped = 0.0
    async with watching(KeyCache(store, clock=lambda: time.monotonic() + skipped)) as cache:
        await asyncio.sleep(0.3)
        assert await cache.lookup(key) is not None
        assert postgres.process is not None
        server = psutil.Process(postgres.process.pid)
        frozen = [*server.children(recursive=True), server]  # connected, and never answering: a network that is cut
        for process in frozen:
            os.kill(process.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(1.5)
            skipped = 61.0

            async def forgotten() -> bool:
                try:
                    async with asyncio.timeout(1):
                        return await cache.lookup(key) is None
                except (TimeoutError, Overloaded):
                    return True

            assert await eventually(forgotten, 8)
        finally:
            for process in frozen:
                os.kill(process.pid, signal.SIGCONT)
            await asyncio.sleep(0.5)
    engine.dispose()
