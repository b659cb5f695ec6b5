"""One replica as the pool knows it, and a request's stay on it."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from synthia_vllm.metrics.replicas import ReplicaState, ReplicaView

# died: the connection broke; hung: no canary in time; drained: it is to stop; error: it said so itself.
LossReason = Literal["died", "hung", "drained", "error"]

# A new replica gets so many requests at once, and twice as many after each of so many parts of the slow start.
_FIRST_REQUESTS = 8
_DOUBLINGS = 8


@dataclass(slots=True, eq=False)
class Replica:
    """Where an engine answers, what is known of its health, and the legs that run on it. Times are loop time."""

    name: str
    url: str
    state: ReplicaState = "unproven"
    in_flight: int = 0
    tokens: int | None = None  # of KV cache, as the engine tells
    model: str | None = None
    context: int | None = None  # most tokens of prompt and reply
    last_heard: float = 0.0  # any byte of any reply
    asked_at: float = 0.0  # the last canary's start
    up_since: float | None = None
    on_trial: bool = False  # a request under which another replica died has not had a token here yet
    draining_since: float | None = None
    canary: "asyncio.Task[None] | None" = None
    legs: "set[Leg]" = field(default_factory=set)

    def limit(self, now: float, slow_start: float) -> float:
        """Requests at once that it may be given: few at first, so that those who waited don't all fall on it."""
        age = now - (self.up_since or now)
        if age >= slow_start:
            return float("inf")
        return float(_FIRST_REQUESTS * 2 ** (_DOUBLINGS * age / slow_start))

    def take_legs_away(self, reason: LossReason, *, only_movable: bool = False) -> None:
        """Interrupts the requests that run here; each goes on elsewhere."""
        for leg in list(self.legs):
            if leg.movable or not only_movable:
                leg.take_away(reason)

    def view(self) -> ReplicaView:
        return ReplicaView(self.name, self.url, self.state, self.in_flight)


class LegLost(Exception):
    """A replica was lost under a request, or could not answer it; `reached`: the request may have caused it."""

    def __init__(self, reason: LossReason, detail: str = "", *, reached: bool = True) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.reached = reached


class Leg:
    """One request's stay on one replica. `take_away` ends it from outside, wherever it waits for the replica.

    It never interrupts what is being sent to the client: those bytes would be lost. Hence no cancellation but a
    deadline until the reply's headers are there, and the connection's end from then on.
    """

    def __init__(self, replica: Replica, *, movable: bool) -> None:
        self.replica = replica
        self.movable = movable  # can go on elsewhere without the client's notice
        self.taken: LossReason | None = None
        self._deadline: asyncio.Timeout | None = None
        self._reply: aiohttp.ClientResponse | None = None

    def __enter__(self) -> "Leg":
        self.replica.legs.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.replica.legs.discard(self)
        if self._reply is not None:
            self._reply.close()  # of a reply that was read to its end, a no-op: the connection went back then

    def take_away(self, reason: LossReason) -> None:
        self.taken = self.taken or reason
        if self._reply is not None:
            self._reply.close()
        elif self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def ask(
        self, session: aiohttp.ClientSession, method: str, url: str, **options: object
    ) -> aiohttp.ClientResponse:
        """The reply, as soon as its headers are there. Raises LegLost if taken away, and aiohttp's errors."""
        try:
            async with asyncio.timeout(None) as self._deadline:
                if self.taken:
                    raise LegLost(self.taken)
                self._reply = await session.request(method, url, allow_redirects=False, **options)  # type: ignore[arg-type]
        except TimeoutError:
            if self.taken:
                raise LegLost(self.taken) from None
            raise
        return self._reply
