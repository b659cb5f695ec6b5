"""Limits counted in Redis: for several gateways."""

import asyncio
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Literal

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import Refusal, Standing, month_of
from synthia_vllm.gateway.limits.memory import MemoryLimiter, Spent
from synthia_vllm.metrics.limits import FALLBACKS, SHARED_UP

OnLoss = Literal["closed", "local"]
LEASE_S = 30.0
_TIMEOUT_S = 1.0
_PROBE_S = 1.0  # while Redis is gone, it is asked no more often
_MOST_AT_ONCE = 32  # decisions; more wait here, since a pool without connections left reads like a Redis that is gone

_log = structlog.get_logger(__name__)


class SharedLimiter:
    """One script a decision (limits.lua), by Redis' own clock; only which month it is, the gateway's clock says.

    Open calls are leases that a heartbeat renews; one that lapses gives back its reservation, and what its call used
    is then not counted. While Redis is gone: `closed` raises Overloaded (503), `local` counts in this process; what
    Redis knew before it went comes back with it, what was counted locally does not go there. It is gone where it
    can't be reached, does not answer for `timeout` seconds, or takes nothing (read-only, out of memory).
    """

    def __init__(
        self,
        url: str,
        *,
        on_loss: OnLoss = "local",
        spent: Spent | None = None,
        lease: float = LEASE_S,
        timeout: float = _TIMEOUT_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._script = self._redis.register_script(files(__package__).joinpath("limits.lua").read_text())
        self._on_loss = on_loss
        self._spent = spent
        self._lease = lease
        self._clock = clock  # None: Redis' own; tests set one
        self._local = MemoryLimiter(spent=spent)
        self._open: dict[str, str] = {}  # call: user
        self._unsettled: dict[str, tuple[str, int]] = {}  # call: user and tokens that Redis has yet to hear of
        self._heartbeat: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)
        self._down_since: float | None = None
        self._probed = 0.0
        SHARED_UP.set(1)

    async def reserve(self, user: str, limits: UserLimits, call_id: str, tokens: int) -> Refusal | None:
        if self._heartbeat is None:
            self._heartbeat = asyncio.create_task(self._beat())
        wanted = [limits.requests_per_minute, limits.tokens_per_minute]
        wanted += [limits.concurrent_requests, limits.tokens_per_month]
        words = [call_id, tokens, *("" if limit is None else limit for limit in wanted)]
        try:
            answer = await self._run(user, "reserve", *words)
            while answer == [b"unseeded"]:
                answer = await self._run(user, "reserve", *words, *await self._billed(user))
        except asyncio.CancelledError:
            self._unsettled[call_id] = user, 0  # Redis may have booked it
            raise
        if answer is None:
            FALLBACKS.labels(self._on_loss).inc()
            if self._on_loss == "closed":
                raise Overloaded("the shared limits can't be reached", 5.0)
            return await self._local.reserve(user, limits, call_id, tokens)
        if answer:
            return Refusal(answer[0].decode(), int(answer[1]), float(answer[2]))
        self._open[call_id] = user
        return None

    async def settle(self, user: str, call_id: str, tokens: int) -> None:
        await self._local.settle(user, call_id, tokens)
        if self._open.pop(call_id, None) is None:
            return
        self._unsettled[call_id] = user, tokens  # kept where this is cancelled too
        if await self._run(user, "settle", call_id, tokens) is not None:
            self._unsettled.pop(call_id, None)

    async def standing(self, user: str) -> Standing:
        answer = await self._run(user, "standing")
        return await self._local.standing(user) if answer is None else Standing(*map(int, answer))

    async def close(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)
        await self._settle_late()
        await self._redis.aclose()

    async def _run(self, user: str, operation: str, *words: str | int) -> list[bytes] | None:
        """The script's answer; None where Redis is gone."""
        async with self._slots:
            probing = self._down_since is not None
            if probing:
                if time.monotonic() - self._probed < _PROBE_S:
                    return None
                self._probed = time.monotonic()  # the others don't wait for what this one finds
            now = self._clock() if self._clock else time.time()
            month, _, end = month_of(now)
            try:
                answer: list[bytes] = await self._script(
                    keys=[_prefix(user)],
                    args=[operation, now if self._clock else "", self._lease, month, end - now, *words],
                )
            except (RedisError, OSError, TimeoutError) as error:
                if operation == "reserve" and not probing:
                    self._unsettled[str(words[0])] = user, 0  # Redis may have booked it
                if type(error) is ResponseError:
                    return self._failed(error, user, operation)
                self._lost(error)
                return None
        if self._down_since is not None:
            _log.warning("shared_limits_back", after_s=round(time.monotonic() - self._down_since, 1))
            self._down_since = None
            SHARED_UP.set(1)
        return answer

    def _failed(self, error: ResponseError, user: str, operation: str) -> list[bytes]:
        """The script failed on this user's keys: that is no Redis that is gone. What was to be settled is given up."""
        _log.error("shared_limits_failed", user=user, operation=operation, error=str(error))
        if operation in ("settle", "renew"):
            return []
        raise error

    def _lost(self, error: Exception) -> None:
        self._probed = time.monotonic()
        if self._down_since is None:
            self._down_since = self._probed
            self._local.forget_months()
            SHARED_UP.set(0)
            _log.error("shared_limits_lost", error=str(error), now=self._on_loss)

    async def _billed(self, user: str) -> tuple[int, str]:
        """What the ledger has of this month, where the month's counter starts, and which month that is."""
        month, start, _ = month_of(self._clock() if self._clock else time.time())
        return await asyncio.to_thread(self._spent, user, start) if self._spent else 0, month

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            await self._settle_late()
            await self._renew()

    async def _renew(self) -> None:
        users: dict[str, list[str]] = {}
        for call, user in self._open.items():
            users.setdefault(user, []).append(call)
        await asyncio.gather(*(self._run(user, "renew", *calls) for user, calls in users.items()))

    async def _settle_late(self) -> None:
        for call, (user, tokens) in list(self._unsettled.items()):
            if await self._run(user, "settle", call, tokens) is None:
                return
            self._unsettled.pop(call, None)


def _prefix(user: str) -> str:
    return f"{{synthia:limits:{user}}}"
