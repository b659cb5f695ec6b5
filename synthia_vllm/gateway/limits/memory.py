"""Limits counted in this process: for one gateway."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import WINDOW_S, OnLoss, Refusal, Standing, month_of
from synthia_vllm.gateway.limits.billed import Billed, Spent

_MOST_USERS = 10_000  # beyond, those with nothing in the window are forgotten, and again at each doubling
_LEARNING_RATE = 0.2


@dataclass(slots=True, eq=False)
class _Admission:
    at: float
    tokens: int
    month: str
    in_window: bool = True


@dataclass(slots=True)
class _User:
    window: deque[_Admission] = field(default_factory=deque)
    window_tokens: int = 0
    open: dict[str, _Admission] = field(default_factory=dict)
    months: dict[str, int] = field(default_factory=dict)
    mean_duration: float = 1.0

    def expire(self, now: float) -> None:
        while self.window and self.window[0].at + WINDOW_S <= now:
            gone = self.window.popleft()
            gone.in_window = False
            self.window_tokens -= gone.tokens


class MemoryLimiter:
    """`spent(user, since)` gives the tokens that the ledger has billed: the month's counter starts from it.

    The window is by `clock`, which nobody can set; only which month it is, `wall` says.
    """

    def __init__(
        self,
        *,
        spent: Spent | None = None,
        on_loss: OnLoss = "local",
        answer_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._billed = Billed(spent, on_loss, answer_s=answer_s)
        self._clock = clock
        self._wall = wall
        self._users: dict[str, _User] = {}
        self._most_users = _MOST_USERS

    async def reserve(self, user: str, limits: UserLimits, call_id: str, tokens: int) -> Refusal | None:
        month, start, _ = month_of(self._wall())
        if limits.tokens_per_month is not None and month not in self._user(user).months:
            spent = await self._billed.since(user, start)
            if spent is not None:
                state = self._user(user)
                # The ledger does not have what is open yet.
                reserved = sum(admission.tokens for admission in state.open.values() if admission.month == month)
                state.months.setdefault(month, spent + reserved)
        return self._reserve(self._user(user), limits, call_id, tokens)

    async def look(self, user: str, limits: UserLimits) -> Refusal | None:
        state = self._users.get(user)
        return None if state is None else self._refusal(state, limits, 1)

    async def settle(self, user: str, call_id: str, tokens: int) -> None:
        state = self._users.get(user)
        admission = state.open.pop(call_id, None) if state else None
        if state is None or admission is None:
            return
        now = self._clock()
        state.expire(now)
        change = tokens - admission.tokens
        if admission.in_window:
            state.window_tokens += change
        admission.tokens = tokens
        if admission.month in state.months:
            state.months[admission.month] += change
        state.mean_duration += _LEARNING_RATE * (now - admission.at - state.mean_duration)

    async def release(self, user: str, call_id: str) -> None:
        await self.settle(user, call_id, 0)

    async def standing(self, user: str) -> Standing:
        state = self._users.get(user)
        if state is None:
            return Standing()
        state.expire(self._clock())
        month, _, _ = month_of(self._wall())
        return Standing(len(state.window), state.window_tokens, len(state.open), state.months.get(month, 0))

    async def close(self) -> None:
        self._users.clear()

    def forget_months(self) -> None:
        """The ledger is asked again: for one that has not counted what came in between."""
        for state in self._users.values():
            state.months.clear()

    def _user(self, name: str) -> _User:
        state = self._users.get(name)
        if state is None:
            if len(self._users) >= self._most_users:
                self._forget()
                self._most_users = max(_MOST_USERS, 2 * len(self._users))
            state = self._users[name] = _User()
        return state

    def _forget(self) -> None:
        now = self._clock()
        for name, state in list(self._users.items()):
            state.expire(now)
            if not state.window and not state.open:
                del self._users[name]  # a month's counter comes back from the ledger

    def _reserve(self, state: _User, limits: UserLimits, call_id: str, tokens: int) -> Refusal | None:
        """The decision and the booking, without a pause in between."""
        if (refusal := self._refusal(state, limits, tokens)) is not None:
            return refusal
        month, _, _ = month_of(self._wall())
        admission = _Admission(self._clock(), tokens, month)
        state.window.append(admission)
        state.window_tokens += tokens
        state.open[call_id] = admission
        state.months = {name: used for name, used in state.months.items() if name == month}
        if month in state.months:
            state.months[month] += tokens
        return None

    def _refusal(self, state: _User, limits: UserLimits, tokens: int) -> Refusal | None:
        now, wall = self._clock(), self._wall()
        state.expire(now)
        month, _, month_end = month_of(wall)
        found = (
            self._requests(state, limits.requests_per_minute, now),
            self._tokens(state, limits.tokens_per_minute, tokens, now),
            self._concurrent(state, limits.concurrent_requests, now),
            self._month(state, limits.tokens_per_month, tokens, month, month_end - wall),
        )
        refusals = [refusal for refusal in found if refusal is not None]
        return max(refusals, key=lambda refusal: refusal.retry_after, default=None)  # all must have passed

    def _requests(self, state: _User, limit: int | None, now: float) -> Refusal | None:
        if limit is None or len(state.window) < limit:
            return None
        # So many of the oldest must go.
        last = state.window[len(state.window) - limit]
        return Refusal("requests_per_minute", limit, last.at + WINDOW_S - now)

    def _tokens(self, state: _User, limit: int | None, tokens: int, now: float) -> Refusal | None:
        if limit is None or state.window_tokens + tokens <= limit:
            return None
        if tokens > limit:
            return Refusal("tokens_per_minute", limit, math.inf)
        excess = state.window_tokens + tokens - limit
        for admission in state.window:
            excess -= admission.tokens
            if excess <= 0:
                return Refusal("tokens_per_minute", limit, admission.at + WINDOW_S - now)
        raise AssertionError("a window's tokens are the sum of its admissions'")

    def _concurrent(self, state: _User, limit: int | None, now: float) -> Refusal | None:
        if limit is None or len(state.open) < limit:
            return None
        oldest = min(admission.at for admission in state.open.values())
        return Refusal("concurrent_requests", limit, max(1.0, state.mean_duration - (now - oldest)))

    def _month(self, state: _User, limit: int | None, tokens: int, month: str, left: float) -> Refusal | None:
        if limit is None or state.months.get(month, 0) + tokens <= limit:
            return None
        return Refusal("tokens_per_month", limit, math.inf if tokens > limit else left)
