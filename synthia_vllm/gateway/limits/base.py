"""What a counter of users' limits does, wherever it counts."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from synthia_vllm.gateway.accounts import UserLimits

WINDOW_S = 60.0

# While what counts can't be asked: refuse, or count here and let pass what can't be counted.
OnLoss = Literal["closed", "local"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit refuses, and the least wait in seconds after which the same request gets in if nothing else happens.

    `math.inf`: never, the request alone is over the limit. Under `concurrent_requests` nobody can know when a running
    request ends: the wait is the user's mean duration less the age of the oldest, an estimate.
    """

    reason: str  # a field of UserLimits
    limit: int
    retry_after: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What counts against a user's limits now."""

    requests_last_minute: int = 0
    tokens_last_minute: int = 0
    concurrent_requests: int = 0
    tokens_this_month: int = 0


class Limiter(Protocol):
    """Counts exactly, over a sliding window of 60 s: each admission and its tokens count from then until 60 s later.

    `reserve` takes all or nothing, in one step: a refused request costs nothing. `settle` puts what was really used in
    the place of what was reserved; settling twice, or what is not known, does nothing. A clock that is set, forwards or
    backwards, changes nothing of the window; only months are the calendar's.
    """

    async def reserve(self, user: str, limits: UserLimits, call_id: str, tokens: int) -> Refusal | None: ...

    async def look(self, user: str, limits: UserLimits) -> Refusal | None:
        """What even a request for one token would be refused for now. Books nothing."""
        ...

    async def settle(self, user: str, call_id: str, tokens: int) -> None: ...

    async def release(self, user: str, call_id: str) -> None:
        """Gives back what is reserved for a call that another gateway may have had: it has lost its reply."""
        ...

    async def standing(self, user: str) -> Standing: ...

    async def close(self) -> None: ...


def month_of(now: float) -> tuple[str, float, float]:
    """Name, start and end (Unix times) of the calendar month in UTC."""
    start = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    return start.strftime("%Y-%m"), start.timestamp(), end.timestamp()
