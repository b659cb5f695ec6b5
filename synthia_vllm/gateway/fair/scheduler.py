"""The order of requests: who goes next, when, and how long a newcomer would wait. No asyncio in here."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair.counters import Counters
from synthia_vllm.gateway.fair.rate import ServiceRate
from synthia_vllm.gateway.fair.room import Room

Policy = Literal["vtc", "fcfs"]


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place, from joining the queue to its end."""

    user: str
    weight: float
    batch: bool
    prompt: int  # tokens
    most: int  # tokens that it may generate
    joined: float
    go: Callable[[], None]  # called once, when it is its turn
    cost: float = 0.0  # expected, while it waits
    running: bool = False
    generated: int = 0
    held: int = 0  # tokens of KV cache that it counts with
    expected: int = 0  # generated tokens that `held` covers
    owed: float = 0.0  # predicted cost of what it has still to generate


class Scheduler:
    """Waiting requests by user, first in first out, and whose turn is next.

    vtc: the user with the least service; interactive users before batch users, unless a batch request has waited
    `ageing` seconds. fcfs: in the order of arrival, whoever asks.
    """

    def __init__(
        self,
        capacity: Capacity,
        *,
        policy: Policy = "vtc",
        prompt_cost: float = 1.0,
        generated_cost: float = 2.0,
        ageing: float = 30.0,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.policy = policy
        self.counters = Counters(prompt_cost=prompt_cost, generated_cost=generated_cost)
        self.room = Room(capacity)
        self.rate = ServiceRate(clock)
        self.queued_requests = 0
        self.queued_tokens = 0
        self.running: dict[str, int] = {}  # user: requests in the engine
        # The same users: predicted cost of what their requests have still to generate.
        self._owed: dict[str, float] = {}
        self._queues: dict[str, deque[Ticket]] = {}  # users with waiting requests only
        self._backlog: dict[str, float] = {}  # the same users: cost of what they have waiting
        self._ageing = ageing
        self.clock = clock

    def ticket(self, account: Account, prompt: int, most: int, go: Callable[[], None]) -> Ticket:
        batch = account.priority == "batch"
        return Ticket(account.user, account.weight, batch, prompt, most, self.clock(), go)

    def join(self, ticket: Ticket) -> None:
        """Puts a request at the end of its user's queue, and dispatches what has room."""
        queue = self._queues.get(ticket.user)
        if queue is None:
            self.counters.lift(ticket.user, self._queues)
            queue = self._queues[ticket.user] = deque()
            self._backlog[ticket.user] = 0.0
        ticket.cost = self._cost(ticket)
        queue.append(ticket)
        self._backlog[ticket.user] += ticket.cost
        self.queued_requests += 1
        self.queued_tokens += ticket.prompt + ticket.most
        self.dispatch()

    def leave(self, ticket: Ticket) -> None:
        """Takes a waiting request out."""
        self._queues[ticket.user].remove(ticket)
        self._left(ticket)
        self.dispatch()  # it may have stood in the way

    def dispatch(self) -> None:
        """Sends requests to the engine while there is room."""
        while (ticket := self._next()) is not None:
            ticket.expected = self.room.expected_generated(ticket.user, ticket.most)
            held = self.room.held_by(ticket.prompt, ticket.expected)
            if not self.room.fits(held, newcomer=ticket.user not in self.running):
                break
            self._queues[ticket.user].popleft()
            self._left(ticket)
            ticket.held = held
            ticket.running = True
            self.room.take(held)
            self.running[ticket.user] = self.running.get(ticket.user, 0) + 1
            ticket.owed = self.counters.generated_cost * ticket.expected
            self._owed[ticket.user] = self._owed.get(ticket.user, 0.0) + ticket.owed
            self.counters.charge_prompt(ticket.user, ticket.weight, ticket.prompt)
            ticket.go()
        self.rate.waiting(bool(self._queues))

    def add_tokens(self, ticket: Ticket, count: int) -> None:
        """Charges tokens that the engine has just generated for a running request."""
        if not ticket.generated and count:
            self.rate.add(self.counters.prompt_cost * ticket.prompt)  # now it is computed: served is what is done
        ticket.generated += count
        self._pay(ticket, min(ticket.owed, self.counters.generated_cost * count))
        self.counters.charge_generated(ticket.user, ticket.weight, count)
        self.rate.add(self.counters.generated_cost * count)
        if ticket.generated > ticket.expected:
            held = self.room.held_by(ticket.prompt, ticket.generated)
            self.room.grow(held - ticket.held)
            ticket.held = held
            ticket.expected = held - ticket.prompt

    def finish(self, ticket: Ticket, *, whole: bool = True) -> None:
        """The engine is done with a request. `whole` is False for one that was cut short."""
        ticket.running = False
        self._pay(ticket, ticket.owed)
        self.room.give_back(ticket.held)
        if whole:
            self.room.learn(ticket.user, ticket.generated)
        left = self.running[ticket.user] - 1
        if left:
            self.running[ticket.user] = left
        else:
            del self.running[ticket.user], self._owed[ticket.user]
        self.counters.forget(self._queues.keys() | self.running.keys())
        self.dispatch()

    def predicted_wait(self, account: Account) -> float:
        """Seconds that a request would wait if it came now; 0 where nothing is known yet."""
        rate = self.rate.per_second
        if not self._queues or not rate:
            return 0.0
        return self._cost_ahead(account) / rate

    def seconds_for(self, tokens: int) -> float:
        """How long the engine needs for so many tokens of queue to go; 1 where nothing is known yet."""
        rate = self.rate.per_second
        return self.counters.generated_cost * tokens / rate if rate else 1.0

    def waiting(self) -> dict[str, int]:
        """Requests in the queue, by user."""
        return {user: len(queue) for user, queue in self._queues.items()}

    def snapshot(self) -> dict[str, Any]:
        """For the live view."""
        users = self._queues.keys() | self.running.keys()
        return {
            "policy": self.policy,
            "queued_requests": self.queued_requests,
            "queued_tokens": self.queued_tokens,
            "in_flight_requests": self.room.requests,
            "in_flight_tokens": self.room.tokens,
            "capacity_requests": self.room.capacity.requests,
            "capacity_tokens": self.room.capacity.tokens,
            "service_rate": self.rate.per_second,
            "users": {
                user: {
                    "queued": len(self._queues.get(user, ())),
                    "in_flight": self.running.get(user, 0),
                    "service": self.counters.service.get(user, 0.0),
                }
                for user in sorted(users)
            },
        }

    def _next(self) -> Ticket | None:
        heads = [queue[0] for queue in self._queues.values()]
        if not heads:
            return None
        if self.policy == "fcfs":
            return min(heads, key=lambda head: head.joined)
        latest = self.clock() - self._ageing
        aged = [head for head in heads if head.batch and head.joined <= latest]
        interactive = [head for head in heads if not head.batch]
        return min(aged or interactive or heads, key=self._place)

    def _place(self, head: Ticket) -> tuple[float, int, float]:
        """What is lowest goes first: service had, and service under way as far as it can be predicted.

        Without the second part, all places that come free go to one user until its tokens have streamed, then all to
        another: fair over minutes only (the paper's section on length prediction).
        """
        user = head.user
        service = self.counters.service[user] + self._owed.get(user, 0.0) / head.weight
        return service, self.running.get(user, 0), head.joined

    def _pay(self, ticket: Ticket, cost: float) -> None:
        ticket.owed -= cost
        self._owed[ticket.user] -= cost

    def _left(self, ticket: Ticket) -> None:
        self.queued_requests -= 1
        self.queued_tokens -= ticket.prompt + ticket.most
        self._backlog[ticket.user] -= ticket.cost
        if not self._queues[ticket.user]:
            del self._queues[ticket.user], self._backlog[ticket.user]
            self.counters.left_queue(ticket.user)

    def _cost(self, ticket: Ticket) -> float:
        expected = self.room.expected_generated(ticket.user, ticket.most)
        return self.counters.prompt_cost * ticket.prompt + self.counters.generated_cost * expected

    def _cost_ahead(self, account: Account) -> float:
        """Cost of what would be dispatched before a new request of this user.

        Under vtc, other users are served until their counters reach where the user's own queue takes its counter.
        """
        if self.policy == "fcfs":
            return sum(self._backlog.values())
        service = self.counters.service
        own = self._backlog.get(account.user, 0.0)
        start = service.get(account.user, 0.0)
        if account.user not in self._queues:
            start = max(start, min(service[user] for user in self._queues))
        end = start + own / account.weight
        ahead = own
        for user, queue in self._queues.items():
            if user == account.user or (queue[0].batch and account.priority == "interactive"):
                continue
            if account.priority == "batch" and not queue[0].batch:
                ahead += self._backlog[user]
            else:
                ahead += min(self._backlog[user], max(0.0, (end - service[user]) * queue[0].weight))
        return ahead
