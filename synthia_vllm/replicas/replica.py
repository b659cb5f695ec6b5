"""One replica as the pool knows it."""

import asyncio
from collections.abc import Set
from dataclasses import dataclass, field

from synthia_vllm.engine.port import Affinity
from synthia_vllm.metrics.replicas import ReplicaState, ReplicaView
from synthia_vllm.replicas.attempt import Attempt, LossReason
from synthia_vllm.replicas.detect import Endpoint

# A new replica gets so many requests at once, and twice as many after each of so many parts of the slow start.
_FIRST_REQUESTS = 8
_DOUBLINGS = 8


@dataclass(slots=True, eq=False)
class Replica:
    """Where an engine answers, what is known of its health, and the attempts that run on it. Times are loop time."""

    name: str
    endpoint: Endpoint
    state: ReplicaState = "unproven"
    in_flight: int = 0
    tokens: int | None = None  # of KV cache, as the engine tells
    last_heard: float = 0.0  # any byte of any reply
    asked_at: float = 0.0  # the last canary's start
    up_since: float | None = None
    on_trial: bool = False  # a request under which another replica died has not had a token here yet
    draining_since: float | None = None
    canary: "asyncio.Task[None] | None" = None
    attempts: set[Attempt] = field(default_factory=set)

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
