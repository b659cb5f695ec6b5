"""One replica as the pool knows it."""

import asyncio
import math
from collections.abc import Set
from dataclasses import dataclass, field

from synthia_vllm.engine.port import Affinity
from synthia_vllm.metrics.replicas import ReplicaState, ReplicaView
from synthia_vllm.replicas.attempt import Attempt, LossReason
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.health import Health

# A new replica gets so many requests at once, and twice as many after each of so many parts of the slow start.
_FIRST_REQUESTS = 8
_DOUBLINGS = 8
_QUEUES_S = 0.5  # what is refused, is at once


@dataclass(slots=True, eq=False)
class Replica:
    """Where an engine answers, what is known of its health, and the attempts that run on it. Times are loop time."""

    name: str
    endpoint: Endpoint
    health: Health
    state: ReplicaState = "unproven"
    in_flight: int = 0
    doubted_at: float = -math.inf  # since when it has to prove that it works, if it is not up
    hangs: bool = False  # that is why it is out
    asked_at: float = -math.inf  # the last question's start
    canary_at: float = -math.inf  # the last canary's start
    up_since: float | None = None
    deaths: int = 0  # it refused connections, or hung, so often
    on_trial: bool = False  # has a request under which two replicas died, and which is not acquitted yet
    draining_since: float | None = None
    refuses_key: bool = False
    asking: "asyncio.Task[None] | None" = None  # for its counters
    canary: "asyncio.Task[None] | None" = None  # one generated token
    attempts: set[Attempt] = field(default_factory=set)

    @property
    def cache_tokens(self) -> int | None:
        """Of KV cache, as the engine tells."""
        return self.health.counters.cache_tokens if self.health.counters is not None else None

    @property
    def max_requests(self) -> int | None:
        """That the engine runs at once, as it tells."""
        return self.health.counters.max_requests if self.health.counters is not None else None

    @property
    def canary_waits(self) -> bool:
        return self.canary is not None and not self.canary.done()

    def is_known_or_queues(self, now: float) -> bool:
        """Whether it has been up, or has taken the first canary, which waits behind what others have asked for."""
        return self.up_since is not None or (self.canary_waits and now - self.canary_at >= _QUEUES_S)

    @property
    def busy(self) -> bool:
        """Whether it has anything to do.

        A reply that has begun is no sign of that: it may wait for its reader.
        """
        return self.canary_waits or self.health.requests > 0 or not all(attempt.begun for attempt in self.attempts)

    def stands_still(self, now: float) -> bool:
        """Whether it has work and has shown no progress for longer than that work explains."""
        if not self.busy:
            self.health.rested(now)
            return False
        if not self.endpoint.vllm:
            return False  # it tells nothing, and nobody asks it for tokens: its attempts judge their own silence
        still = now - self.health.moved_at
        if still <= self.health.patience:
            return False
        ahead = sum(attempt.prompt_tokens for attempt in self.attempts if not attempt.begun)
        return still > self.health.deadline(ahead, len(self.attempts) + self.canary_waits)

    def limit(self, now: float, slow_start: float) -> float:
        """Requests at once that it may be given: few at first, so that those who waited don't all fall on it."""
        age = now - (self.up_since or now)
        if age >= slow_start:
            return float("inf")
        return float(_FIRST_REQUESTS * 2 ** (_DOUBLINGS * age / slow_start))

    def take_attempts_away(self, reason: LossReason, *, only_movable: bool = False) -> None:
        """Interrupts the requests that run here; each goes on elsewhere."""
        for attempt in list(self.attempts):
            if attempt.movable or not only_movable:
                attempt.take_away(reason)

    def view(self) -> ReplicaView:
        return ReplicaView(self.name, self.endpoint.url, self.state, self.in_flight)


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a replica."""

    affinity: Affinity | None
    avoid: Set[Replica]
    on_trial: bool
    began: float  # loop time
    given: "asyncio.Future[Replica]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
