"""How much of the engine is taken: the tokens that running requests hold in its KV cache, and their number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from synthia_vllm.engine.port import Capacity

_LEARNING_RATE = 0.1
_MAX_USERS = 10_000  # whose usual length is remembered
# Of both capacities, kept for users far below their share, so that they need not wait for another's end.
_NEWCOMERS_SHARE = 1 / 16


@dataclass(frozen=True, slots=True)
class Lease:
    """The most that this gateway may hold until it has settled with the others again."""

    most: Capacity
    newcomers: Capacity  # with requests of users far below their share


class Room:
    """Keeps the tokens in flight near what the KV cache holds.

    A request counts with its prompt and with the longer of what it has generated and what its user's requests of late
    generated (never more than it may): counting with the most it may would leave most of the cache empty, since replies
    rarely get that long. Where the guess was too low, vLLM preempts and recomputes; nothing fails.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.lease: Lease | None = None  # None: all of the capacity is for this gateway
        self.tokens = 0
        self.requests = 0
        self._mean_generated: dict[str, float] = {}  # by user
        self._mean_of_all: float | None = None  # for a user not seen before

    def held_by(self, prompt: int, generated: int) -> int:
        """Tokens of cache that a request takes, whole blocks."""
        block = self.capacity.block
        return -(-(prompt + generated) // block) * block

    def expected_generated(self, user: str, most: int, requests: int = 1) -> int:
        """By requests that may generate so much between them."""
        mean = self._mean_generated.get(user, self._mean_of_all)
        return most if mean is None else min(most, math.ceil(mean * requests))

    def fits(self, tokens: int, *, newcomer: bool) -> bool:
        """Whether one more request would find room. An empty engine takes anything."""
        if self.requests == 0:
            return True
        lease = self.lease or self._all
        most = lease.newcomers if newcomer else lease.most
        if most.requests is not None and self.requests >= most.requests:
            return False
        return most.tokens is None or self.tokens + tokens <= most.tokens

    @property
    def capacity(self) -> Capacity:
        """What the engines hold."""
        return self._all.newcomers

    @capacity.setter
    def capacity(self, capacity: Capacity) -> None:
        tokens, requests, share = capacity.tokens, capacity.requests, 1.0 - _NEWCOMERS_SHARE
        most = replace(
            capacity,
            tokens=None if tokens is None else int(tokens * share),
            requests=None if requests is None else max(1, int(requests * share)),
        )
        self._all = Lease(most, capacity)

    @property
    def without_reserve(self) -> Capacity:
        """What they hold, less what is kept for newcomers."""
        return self._all.most

    def lend(self, most: Sequence[float], free: Sequence[float], gateways: int) -> None:
        """What this gateway may hold beside others, in tokens and requests; negative: without bound.

        `free` is what they all leave, less what is kept for newcomers; of that, too, each has its part.
        """
        capacity, usual = self._all.newcomers, self._all.most
        found = []
        for whole, rest, lent, left, now in (
            (capacity.tokens, usual.tokens, most[0], free[0], self.tokens),
            (capacity.requests, usual.requests, most[1], free[1], self.requests),
        ):
            kept = 0 if whole is None or rest is None else max(0, int(min(whole - rest, whole - rest + left)))
            found.append(None if lent < 0 else max(int(lent), now + max(min(1, kept), kept // gateways)))
        self.lease = Lease(
            replace(capacity, tokens=_bound(most[0]), requests=_bound(most[1])),
            replace(capacity, tokens=found[0], requests=found[1]),
        )

    def share(self, tokens: int, requests: int) -> float:
        """The part of what is in the engine that these are, of tokens or requests, whichever is more."""
        return max(tokens / self.tokens, requests / self.requests) if self.tokens else 0.0

    def take(self, tokens: int) -> None:
        self.tokens += tokens
        self.requests += 1

    def grow(self, tokens: int) -> None:
        self.tokens += tokens

    def give_back(self, tokens: int) -> None:
        self.tokens -= tokens
        self.requests -= 1

    def learn(self, user: str, generated: int) -> None:
        """What a request came to, for the guess about the user's next.

        One whose client left early counts like any other: the guess is of how much a request holds until it is gone,
        and leaving is a way to be gone. As a lower bound of what would have come, it would say that he who always
        leaves holds all that he asked for.
        """
        if len(self._mean_generated) >= _MAX_USERS and user not in self._mean_generated:
            self._mean_generated.pop(next(iter(self._mean_generated)))
        mean = self._mean_generated.get(user, float(generated))
        self._mean_generated[user] = mean + _LEARNING_RATE * (generated - mean)
        of_all = float(generated) if self._mean_of_all is None else self._mean_of_all
        self._mean_of_all = of_all + _LEARNING_RATE * (generated - of_all)


def _bound(most: float) -> int | None:
    return None if most < 0 else int(most)
