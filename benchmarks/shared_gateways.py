"""Gateways that share one queue through Redis, before null engines, and users who always ask for more than they get."""

import asyncio
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.soak_stores import redis_in, running
from synthia_vllm.bench.null.tokenizer import write as write_tokenizer
from synthia_vllm.bench.processes import Launched, launch
from synthia_vllm.bench.replica_set import ReplicaSet
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore

TOKENS = 600  # that the engines hold at once
PROMPT, REPLIES = 16, (8, 16, 24, 32)  # tokens
_ENGINE = ("--tokens-per-second", "40", "--max-num-seqs", "64")
_LOOK_S = 0.2
_TOLD = 90  # characters of an error


@dataclass
class Fleet:
    """Four gateways and what is behind them."""

    folder: Path
    command: list[str]
    environment: dict[str, str]
    keys: dict[str, str]  # by user
    admin: str
    gateways: list[Launched] = field(default_factory=list)
    _started: int = 0

    def start(self) -> Launched:
        self._started += 1
        return launch(f"gateway-{self._started}", self.command, self.environment, self.folder, health="/ready")

    async def ready(self, gateway: Launched) -> None:
        while await asyncio.to_thread(gateway.look) is None:
            await asyncio.sleep(0.2)


@contextmanager
def fleet(folder: Path, users: int, gateways: int = 4) -> Iterator[Fleet]:
    with ExitStack() as stack:
        redis = stack.enter_context(running(redis_in(folder / "redis")))
        engines = stack.enter_context(ReplicaSet(2, options=_ENGINE))
        engines.wait()
        secret, database = secrets.token_hex(), f"sqlite:///{folder / 'keys.db'}"
        store = KeyStore(open_database(database), secret.encode())
        keys = {f"u{number}": store.create(f"u{number}")[1] for number in range(users)}
        command = [sys.executable, "-m", "synthia_vllm", "gateway", "--access.mode", "keys", "--no-log.requests"]
        command += [word for url in engines.listing().values() for word in ("--upstream", url)]
        command += ["--tokenizer", str(write_tokenizer(folder / "tokenizer")), "--fair.max-wait-s", "600"]
        command += ["--fair.max-in-flight-tokens", str(TOKENS)]
        environment = {
            "SYNTHIA_ACCESS__SECRET": secret,
            "SYNTHIA_ACCESS__DATABASE": database,
            "SYNTHIA_LIMITS__REDIS": redis.url,
        }
        found = Fleet(folder, command, environment, keys, store.create("operator", admin=True)[1])
        found.gateways += [found.start() for _ in range(gateways)]
        try:
            yield found
        finally:
            for gateway in found.gateways:
                gateway.process.kill()
                gateway.process.wait()


class Load:
    """Each user has streams at all gateways; service is what came to its clients, in the cost of the fair queue."""

    def __init__(self, fleet: Fleet, streams: int) -> None:
        self.fleet = fleet
        self.streams = streams
        self.service: dict[str, float] = defaultdict(float)
        self.replies = 0
        self.lost = 0  # with a gateway that was killed, or not there yet
        self.refused: Counter[str] = Counter()
        self.most = 0  # tokens in flight, over all gateways
        self.gap = 0.0  # in service, between two users
        self._session: aiohttp.ClientSession

    async def run(self, seconds: float, warm: float, every: float) -> list[float]:
        """Seconds of the kills, from the beginning of what is measured."""
        await asyncio.gather(*(self.fleet.ready(gateway) for gateway in self.fleet.gateways))
        timeout, connector = aiohttp.ClientTimeout(None, sock_read=60), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            tasks = [
                asyncio.create_task(self._keep_asking(user, number))
                for user in self.fleet.keys
                for number in range(self.streams)
            ]
            try:
                await asyncio.sleep(warm)
                return await self._watch(seconds, every)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, seconds: float, every: float) -> list[float]:
        loop = asyncio.get_running_loop()
        began, kills = loop.time(), list[float]()
        leads: dict[str, tuple[float, float]] = {}
        first = next(iter(self.fleet.keys))
        replacing: list[asyncio.Task[None]] = []
        while (now := loop.time() - began) < seconds:
            if now >= every * (len(kills) + 1):
                replacing.append(asyncio.create_task(self._replace(len(kills) % len(self.fleet.gateways))))
                kills.append(round(now, 1))
            states = await asyncio.gather(*(self._held(gateway.url) for gateway in self.fleet.gateways))
            self.most = max(self.most, sum(states))
            for user in self.fleet.keys:
                lead = self.service[user] - self.service[first]
                least, most = leads.get(user, (lead, lead))
                leads[user] = min(least, lead), max(most, lead)
            await asyncio.sleep(_LOOK_S)
        await asyncio.gather(*replacing)
        self.gap = max(most - least for least, most in leads.values())
        return kills

    async def _replace(self, number: int) -> None:
        killed = self.fleet.gateways[number]
        killed.process.kill()
        await asyncio.to_thread(killed.process.wait)
        gateway = self.fleet.start()
        self.fleet.gateways[number] = gateway
        await self.fleet.ready(gateway)

    async def _held(self, url: str) -> int:
        with suppress(aiohttp.ClientError):
            headers = {"Authorization": f"Bearer {self.fleet.admin}"}
            async with self._session.get(f"{url}/admin/state", headers=headers) as reply:
                return int((await reply.json())["in_flight_tokens"])
        return 0

    async def _keep_asking(self, user: str, number: int) -> None:
        gateways: Sequence[Launched] = self.fleet.gateways
        while True:
            try:
                await self._ask(user, gateways[number % len(gateways)].url, number)
            except (aiohttp.ClientError, OSError):
                self.lost += 1
                number += 1
                await asyncio.sleep(0.5)

    async def _ask(self, user: str, url: str, number: int) -> None:
        body = {"model": "null", "prompt": [65] * PROMPT, "max_tokens": REPLIES[number % len(REPLIES)], "stream": True}
        headers = {"Authorization": f"Bearer {self.fleet.keys[user]}"}
        async with self._session.post(f"{url}/v1/completions", json=body, headers=headers) as reply:
            if reply.status != 200:
                self.refused[f"{reply.status} {(await reply.text())[:_TOLD]}"] += 1
                await asyncio.sleep(0.5)
                return
            cost = PROMPT + 2.0
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    self.service[user] += cost
                    cost = 2.0
        self.replies += 1
