"""The other gateways before the same engines: each fills its part of what the engines hold, and not all of it."""

import asyncio
import hashlib
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit
from uuid import uuid4

import redis.asyncio
import structlog
from redis.exceptions import RedisError

from synthia_vllm.engine.port import Capacity
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import LOOPBACK

PERIOD_S = 1.0
FRESH_S = 5.0
_LEFT = -1  # in the place of a beat
_GONE_S = 60.0
_FORGOTTEN_S = 86_400

_log = structlog.get_logger(__name__)


def share(capacity: Capacity, gateways: int) -> Capacity:
    """One gateway's part of what the engines hold: requests are spread evenly over gateways."""
    return replace(
        capacity,
        tokens=None if capacity.tokens is None else max(1, capacity.tokens // gateways),
        requests=None if capacity.requests is None else max(1, capacity.requests // gateways),
    )


@dataclass(slots=True)
class _Seen:
    beat: int
    at: float  # by this process' clock, when it was first like this


class Peers:
    """Counts the gateways before the same engines, this one among them, in Redis; tells each new number.

    Each raises a number of its own, its beat, once a second under each of its engines. A value has no time in it, since
    machines' clocks differ and are set: who has not changed it for `FRESH_S` under this one's eyes is gone. Engines are
    the same where their URLs are, and those of the machine itself only on the same machine. While Redis is gone, the
    last number holds.
    """

    def __init__(
        self,
        url: str,
        engines: Sequence[str],
        on_change: Callable[[int], None],
        *,
        least: int = 1,
        timeout: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        self._keys = [f"synthia:gateways:{identity(engine)}" for engine in engines]
        self._on_change = on_change
        self._least = least
        self._clock = clock
        self._id = uuid4().hex
        self._seen: dict[str, dict[str, _Seen]] = {}  # by engine and gateway
        self._told = 0
        self._lost = False

    async def run(self) -> None:
        """Counts until it is cancelled."""
        while True:
            await self.count()
            await asyncio.sleep(PERIOD_S)

    async def count(self) -> None:
        """Raises this gateway's beat and looks at those of the others."""
        try:
            async with self._redis.pipeline(transaction=False) as asked:
                for key in self._keys:
                    asked.hincrby(key, self._id, 1)
                    asked.expire(key, _FORGOTTEN_S)
                    asked.hgetall(key)
                answers = await asked.execute()
            await self._forget()
        except (RedisError, OSError, TimeoutError) as error:
            if not self._lost:
                _log.error("gateways_not_counted", error=str(error), last=self._told or self._least)
            self._lost = True
            return
        self._lost = False
        found = max([self._alive(key, beats) for key, beats in zip(self._keys, answers[2::3], strict=True)])
        if (number := max(found, self._least)) != self._told:
            self._told = number
            _log.info("gateways_share_the_engines", gateways=number)
            self._on_change(number)

    async def close(self) -> None:
        """Leaves its part to the others at once."""
        try:
            for key in self._keys:
                await self._redis.hset(key, self._id, _LEFT)
        except (RedisError, OSError, TimeoutError):
            pass  # they find out by its beat
        await self._redis.aclose()

    async def _forget(self) -> None:
        """Takes out who has long been gone; nobody else does."""
        for key, seen in self._seen.items():
            gone = [name for name, one in seen.items() if self._clock() - one.at > _GONE_S]
            if gone:
                await self._redis.hdel(key, *gone)
            for name in gone:
                del seen[name]

    def _alive(self, key: str, beats: dict[bytes, bytes]) -> int:
        """Those whose beat is fresh, and in the answer or not: a Redis that starts anew is empty at first."""
        now, seen = self._clock(), self._seen.setdefault(key, {})
        for word, beat in beats.items():
            name, number = word.decode(), int(beat)
            if name not in seen or seen[name].beat != number:
                seen[name] = _Seen(number, now)
        return sum(one.beat != _LEFT and now - one.at <= FRESH_S for one in seen.values())


def identity(engine: str) -> str:
    """The same for all gateways before one engine, as far as a URL tells."""
    found = urlsplit(engine.rstrip("/"))
    machine = platform.node() if found.hostname in LOOPBACK else ""
    port = found.port or {"http": 80, "https": 443}.get(found.scheme)
    return hashlib.sha256(f"{machine} {found.hostname}:{port}{found.path}".encode()).hexdigest()[:16]


def claim(engines: Sequence[str]) -> list[socket.socket]:
    """Takes engines for this gateway alone, as long as what is returned is open; on this machine, and on Linux only.

    Raises SetupError where another gateway of this machine has taken one.
    """
    held: list[socket.socket] = []
    for engine in engines if sys.platform == "linux" else ():
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        held.append(name)
        try:
            name.bind(f"\0synthia-gateway-{identity(engine)}")  # no file: it goes with its process
        except OSError:
            for one in held:
                one.close()
            raise SetupError(
                f"--upstream {engine}: another gateway of this machine is before it, and each would fill all of its KV "
                "cache; give both the same --limits.redis, through which they count each other, or --fair.gateways 2"
            ) from None
    return held
