"""Who asks, and what they may: the facts about a user that the layers act on."""

from dataclasses import dataclass
from typing import Any, Literal, Self

USER_NAME = r"[\w.@:+-]{1,64}"

Priority = Literal["interactive", "batch"]

# More than anybody uses. The database's integers have 64 bits, JavaScript's numbers 53.
MAX_LIMIT = 10**15


@dataclass(frozen=True, slots=True)
class UserLimits:
    """What one user may use; None is unlimited. Tokens are prompt and generated tokens together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_month: int | None = None  # calendar month, UTC

    @classmethod
    def of(cls, holder: Any) -> Self:
        """Those of whatever has them among its attributes."""
        return cls(**{name: getattr(holder, name) for name in cls.__slots__})


UNLIMITED = UserLimits()


@dataclass(frozen=True, slots=True)
class Account:
    """A user as known from the key of a request."""

    user: str
    weight: float = 1.0  # share of the engine under backlog, relative to other users
    priority: Priority = "interactive"
    limits: UserLimits = UNLIMITED
    models: frozenset[str] | None = None  # None: all
    admin: bool = False  # an admin key: opens /admin/*, and nothing else
    key_id: str | None = None
    expires: float | None = None  # Unix time, seconds


ANONYMOUS = Account("anonymous")
