"""Limits counted in Redis: for several gateways."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.resources import files

import structlog
from redis.exceptions import ResponseError

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import OnLoss, Refusal, Standing, month_of
from synthia_vllm.gateway.limits.billed import Billed, Spent
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.metrics.limits import FALLBACKS, SHARED_UP
from synthia_vllm.redis_client import REDIS_GONE, open_redis
from synthia_vllm.supervise import stop, supervise

LEASE_S = 30.0
_PROBE_S = 1.0  # while Redis is gone, it is asked no more often
_KNOWN_S = 3600.0  # so long after his last answer it is known what a user's time should be
_MOST_AT_ONCE = 32  # decisions; more wait here, since a pool without connections left reads like a Redis that is gone

_log = structlog.get_logger(__name__)


class SharedLimiter:
    """One script a decision (limits.lua), by Redis' own clock; only which month it is, the gateway's clock says.

    Where Redis' clock is set, a user's time goes on by what this process measures with one that can't be. Open calls
    are leases that a heartbeat renews; one that lapses gives back its reservation, which comes back with its gateway
    if that only stood still, within an hour.

    While Redis is gone: `closed` raises Overloaded (503), `local` counts in this process; what Redis knew before it
    went comes back with it, what was counted locally does not go there. It is gone where it can't be reached, does not
    answer for `timeout` seconds, or takes nothing (read-only, out of memory).
    """

    def __init__(
        self,
        url: str,
        *,
        on_loss: OnLoss = "local",
        spent: Spent | None = None,
        answer_s: float = 3.0,
        lease: float = LEASE_S,
        timeout: float = 1.0,
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
        wall: Callable[[], float] | None = None,
    ) -> None:
        self._redis = open_redis(url, timeout)
        self._script = self._redis.register_script(files(__package__).joinpath("limits.lua").read_text())
        self._on_loss = on_loss
        self._billed = Billed(spent, on_loss, answer_s=answer_s)
        self._lease = lease
        self._clock = clock  # None: Redis' own; tests set one
        self._monotonic = monotonic or clock or time.monotonic
        self._wall = wall or clock or time.time
        self._times: OrderedDict[str, tuple[float, float]] = OrderedDict()  # user: Redis' time, and when by ours
        self._local = MemoryLimiter(spent=spent, on_loss=on_loss)
        self._open: dict[str, str] = {}  # call: user
        self._unsettled: dict[str, tuple[str, int]] = {}  # call: user and tokens that Redis has yet to hear of
        self._heartbeat: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)
        self._down_since: float | None = None
        self._probed = 0.0
        SHARED_UP.set(1)

    async def reserve(self, user: str, limits: UserLimits, call_id: str, tokens: int) -> Refusal | None:
        if self._heartbeat is None:
            self._heartbeat = supervise("leases", self._beat)
        words = [call_id, tokens, *_words(limits)]
        try:
            answer = await self._run(user, "reserve", *words)
            while answer == [b"unseeded"]:
                month, start, _ = month_of(self._wall())
                billed = await self._billed.since(user, start)
                if billed is None:
                    words[-1] = ""  # the other limits hold
                answer = await self._run(user, "reserve", *words, *(() if billed is None else (billed, month)))
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

    async def look(self, user: str, limits: UserLimits) -> Refusal | None:
        answer = await self._run(user, "look", "", 1, *_words(limits))
        if answer == [b"unseeded"]:  # the month is for `reserve` to ask after
            answer = await self._run(user, "look", "", 1, *_words(limits)[:-1], "")
        if answer is None:
            return await self._local.look(user, limits)
        return Refusal(answer[0].decode(), int(answer[1]), float(answer[2])) if answer else None

    async def settle(self, user: str, call_id: str, tokens: int) -> None:
        await self._local.settle(user, call_id, tokens)
        if self._open.pop(call_id, None) is None:
            return
        self._unsettled[call_id] = user, tokens  # kept where this is cancelled too
        if await self._run(user, "settle", call_id, tokens) is not None:
            self._unsettled.pop(call_id, None)

    async def release(self, user: str, call_id: str) -> None:
        await self._local.settle(user, call_id, 0)
        self._open.pop(call_id, None)
        self._unsettled[call_id] = user, 0
        if await self._run(user, "settle", call_id, 0) is not None:
            self._unsettled.pop(call_id, None)

    async def standing(self, user: str) -> Standing:
        answer = await self._run(user, "standing")
        return await self._local.standing(user) if answer is None else Standing(*map(int, answer))

    async def close(self) -> None:
        if self._heartbeat is not None:
            await stop(self._heartbeat)
        self._probed = 0.0
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
            wall, asked = self._wall(), self._monotonic()
            month, _, end = month_of(wall)
            told = self._clock() if self._clock else ""
            try:
                answer: list[bytes] = await self._script(
                    keys=[_prefix(user)],
                    args=[operation, told, self._expected(user, asked), self._lease, month, end - wall, *words],
                )
            except REDIS_GONE as error:
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
        self._times[user] = float(answer[0]), asked
        self._times.move_to_end(user)
        return answer[1:]

    def _expected(self, user: str, now: float) -> float | str:
        """A user's time, by this process' own clock; unknown where he was not here of late."""
        while self._times and now - next(iter(self._times.values()))[1] > _KNOWN_S:
            self._times.popitem(last=False)
        if user not in self._times:
            return ""
        told, asked = self._times[user]
        return told + now - asked

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


def _words(limits: UserLimits) -> list[int | str]:
    """The limits as the script takes them."""
    wanted = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrent_requests,
        limits.tokens_per_month,
    )
    return ["" if limit is None else limit for limit in wanted]


def _prefix(user: str) -> str:
    return f"{{synthia:limits:{user}}}"
