"""All that runs in a soak: the engine's server, the gateway before it, its stores, and the load with the faults."""

import asyncio
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_stores import Store, faults, postgres_in, redis_in, running
from benchmarks.soak_users import AT_ONCE, KINDS, Client, Users, capped, name_of
from benchmarks.soak_watch import Server, Watch, engines
from synthia_vllm.bench import processes
from synthia_vllm.engine.demo import demo_model
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore

Say = Callable[[str], None]

_LOOK_S = 10.0
_TOLD_S = 60.0
_PYTHON = [sys.executable, "-m", "synthia_vllm"]
_ENGINE = ["--engine.max-model-len", "2048", "--engine.kv-cache-gib", "0.25", "--log-file", "-"]
_SEQUENCES = ["--", "--max-num-seqs", "16"]  # few, so that requests wait


@dataclass
class House:
    """A server with an engine, a gateway, and its stores, all running."""

    engine: Server
    gateway: Server
    pids: Mapping[str, int]
    keys: Mapping[str, str]  # by user
    postgres: Store
    redis: Store
    say: Say
    happened: Counter[str] = field(default_factory=Counter)  # faults

    async def load(self, users: Users, seconds: float, every: float | None, stop: asyncio.Event) -> Watch:
        """For so long, or until `stop`, and to the last request's end; a fault comes every so many seconds, or none."""
        watch = Watch(self.pids)
        looking = asyncio.create_task(self._look(watch, users))
        tasks = [asyncio.create_task(users.run(stop)), looking]
        if every is not None:
            tasks.append(asyncio.create_task(self._faults(every, stop)))
        timer = asyncio.get_running_loop().call_later(seconds, stop.set)
        try:
            while not stop.is_set():
                done, _ = await asyncio.wait(tasks, timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            looking.cancel()
            await asyncio.gather(*(task for task in tasks if task is not looking))
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return watch

    async def places(self) -> dict[str, str]:
        """What a user gets who asks for as many at once as it may, with Redis and without: each has its own counts."""
        found = {}
        async with Users(self.gateway.url, self.keys).session() as session:
            client = Client(self.gateway.url, self.keys[name_of("capped", 0)], session, random.Random(0))
            found["with Redis"] = _told(await capped(client, AT_ONCE))
            await asyncio.to_thread(self.redis.stop)
            try:
                found["without"] = _told(await capped(client, AT_ONCE))
            finally:
                await asyncio.to_thread(self.redis.start)
        return found

    async def _look(self, watch: Watch, users: Users) -> None:
        told = time.monotonic()
        while True:
            await asyncio.to_thread(watch.look)
            if time.monotonic() - told >= _TOLD_S:
                told = time.monotonic()
                memory = ", ".join(f"{name} {looks[-1].anonymous / 1e6:.1f} MB" for name, looks in watch.looks.items())
                answers = sum(one.total() for one in users.answers.values())
                unexpected = sum(users.unexpected().values())
                self.say(
                    f"{watch.times[-1] / 60:.0f} min: {answers} answers, {unexpected} unexpected; "
                    f"{self.happened.total()} faults; {memory}"
                )
            await asyncio.sleep(_LOOK_S)

    async def _faults(self, every: float, stop: asyncio.Event) -> None:
        turn = 0
        while not await _within(stop, every):
            name, begin, seconds, end = faults(self.postgres, self.redis)[turn % 4]
            turn += 1
            await asyncio.to_thread(begin)
            try:
                await _within(stop, seconds)
            finally:
                await asyncio.shield(asyncio.to_thread(end))
            self.happened[name] += 1


@contextmanager
def stores(folder: Path) -> Iterator[tuple[Store, Store]]:
    """PostgreSQL and Redis."""
    with running(postgres_in(folder / "postgres")) as postgres, running(redis_in(folder / "redis")) as redis:
        yield postgres, redis


@contextmanager
def engine(folder: Path) -> Iterator[tuple[Server, int, str]]:
    """`serve`, its pid, and the URL of its own ledger."""
    data = folder / "engine"
    data.mkdir()
    ledger, secret = f"sqlite:///{data / 'synthia.db'}", secrets.token_hex()
    key = _admin(ledger, secret)
    environment = {"SYNTHIA_ACCESS__SECRET": secret, "SYNTHIA_ACCESS__DATABASE": ledger}
    with processes.running("engine", [*_PYTHON, "serve", *_ENGINE], environment, folder, tail=_SEQUENCES) as found:
        yield Server(found.url, key), found.pid, ledger


@contextmanager
def house(folder: Path, postgres: Store, redis: Store, engine: Server, pid: int, say: Say) -> Iterator[House]:
    """The gateway before an engine, with keys for all users."""
    secret = secrets.token_hex()
    admin, keys = _admin(postgres.url, secret), _keys(postgres.url, secret)
    command = [*_PYTHON, "gateway", "--upstream", engine.url, "--tokenizer", str(demo_model())]
    command += ["--access.mode", "keys"]
    environment = {
        "SYNTHIA_ACCESS__SECRET": secret,
        "SYNTHIA_ACCESS__DATABASE": postgres.url,
        "SYNTHIA_LIMITS__REDIS": redis.url,
    }
    with ExitStack() as stack:
        gateway = stack.enter_context(processes.running("gateway", command, environment, folder, health="/ready"))
        pids = {**engines(pid), "serve": pid, "gateway": gateway.pid}
        yield House(engine, Server(gateway.url, admin), pids, keys, postgres, redis, say)


def _admin(database: str, secret: str) -> str:
    return _store(database, secret).create("operator", admin=True)[1]


def _keys(database: str, secret: str) -> dict[str, str]:
    store = _store(database, secret)
    found = {}
    for name, kind in KINDS.items():
        for number in range(kind.users):
            user = name_of(name, number)
            _, found[user] = store.create(user, priority=kind.priority, limits=UserLimits(**kind.limits))
    return found


def _store(database: str, secret: str) -> KeyStore:
    return KeyStore(open_database(database), secret.encode())


def _told(answers: list[str]) -> str:
    return ", ".join(f"{count} times {answer}" for answer, count in Counter(answers).items())


async def _within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
