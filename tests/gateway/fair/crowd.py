"""Users of all kinds around the real scheduler, in virtual time: each step gives every running request one token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair.tickets import Ticket
from tests.gateway.fair.simulated import SimulatedEngine


@dataclass(frozen=True)
class Kind:
    """A user: how many requests he keeps under way, and what of."""

    account: Account
    streams: int = 1
    prompt: int = 10
    most: int = 20
    length: int | None = None  # generated in the end (default: as many as it may)
    pause: float = 0.0  # between a stream's requests
    every: float | None = None  # a stream asks so often, whether it was answered or not
    leaves: float | None = None  # so long after it got its turn
    begins: float = 0.0


@dataclass(eq=False)
class Asked:
    """One request and what came of it."""

    kind: Kind
    joined: float
    predicted: float
    ticket: Ticket | None = None
    started: float | None = None
    ended: float | None = None
    outcome: str = ""  # done, left, late, evicted, or refused

    @property
    def waited(self) -> float:
        assert self.started is not None
        return self.started - self.joined


class Crowd(SimulatedEngine):
    """Does for its users what the layer does: refuses, evicts, gives up waiting."""

    def __init__(
        self,
        capacity: Capacity,
        kinds: Sequence[Kind],
        *,
        max_wait: float = 60.0,
        max_requests: int = 2048,
        max_tokens: int = 4_000_000,
        seed: int = 0,
        **options: object,
    ) -> None:
        super().__init__(capacity, **options)  # type: ignore[arg-type]
        self.max_wait, self.max_requests, self.max_tokens = max_wait, max_requests, max_tokens
        self.asked: list[Asked] = []
        self.random = random.Random(seed)
        self._of: dict[Ticket, Asked] = {}
        self._events: list[tuple[float, int, str, object]] = []
        self._numbers = count()
        for kind in kinds:
            for _ in range(kind.streams):
                jitter = self.random.uniform(0.0, kind.every or kind.pause)
                self._at(kind.begins + jitter, "ask", kind)

    def run_until(self, end: float) -> None:
        while self.clock.now < end:
            while self._events and self._events[0][0] <= self.clock.now:
                _, _, name, what = heappop(self._events)
                getattr(self, f"_{name}")(what)
            self.step()

    def ask(self, kind: Kind) -> Asked:
        """One request, now."""
        self._ask(kind)
        return self.asked[-1]

    def of(self, account: Account, outcome: str = "done") -> list[Asked]:
        return [one for one in self.asked if one.kind.account == account and one.outcome == outcome]

    def _at(self, when: float, name: str, what: object) -> None:
        heappush(self._events, (when, next(self._numbers), name, what))

    def _ask(self, kind: Kind) -> None:
        now, scheduler = self.clock.now, self.scheduler
        one = Asked(kind, now, scheduler.predicted_wait(kind.account, kind.prompt, kind.most))
        self.asked.append(one)
        if kind.every is not None:
            self._at(now + kind.every, "ask", kind)
        if one.predicted > self.max_wait:
            return self._end(one, "refused")
        ticket = one.ticket = scheduler.ticket(kind.account, kind.prompt, kind.most, lambda: self._wake(one))
        self._of[ticket] = one
        self.lengths[ticket] = min(kind.most, kind.length or kind.most)
        scheduler.join(ticket)
        if ticket.running:
            return None
        if not scheduler.make_place(ticket, self.max_requests, self.max_tokens):
            self._refused(one)
            scheduler.leave(ticket)
            return self._end(one, "refused")
        self._at(now + self.max_wait, "give_up", one)
        return None

    def _refused(self, one: Asked) -> None:
        """For who wants to look before it is gone."""

    def _wake(self, one: Asked) -> None:
        assert one.ticket is not None
        if not one.ticket.running:
            self._end(one, "evicted")
            return
        one.started = self.clock.now
        self._start(one.ticket)
        if one.kind.leaves is not None:
            self._at(self.clock.now + one.kind.leaves, "leave", one)

    def _leave(self, one: Asked) -> None:
        if one.ticket in self.running:
            self.running.remove(one.ticket)
            self.scheduler.finish(one.ticket)
            self._end(one, "left")

    def _give_up(self, one: Asked) -> None:
        assert one.ticket is not None
        if one.ticket.waiting:
            self.scheduler.leave(one.ticket)
            self._end(one, "late")

    def _finished(self, ticket: Ticket) -> None:
        self._end(self._of[ticket], "done")

    def _end(self, one: Asked, outcome: str) -> None:
        one.outcome, one.ended = outcome, self.clock.now
        if one.ticket is not None:
            del self._of[one.ticket]
            self.lengths.pop(one.ticket)
        if one.kind.every is None:
            back = 1.0 if outcome in ("refused", "evicted", "late") else self.step_s
            self._at(self.clock.now + max(one.kind.pause, back), "ask", one.kind)
