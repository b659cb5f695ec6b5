"""The order of requests: who goes next, when, and who loses a place in a full queue. No asyncio in here."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair.counters import Counters
from synthia_vllm.gateway.fair.elsewhere import Elsewhere, Told
from synthia_vllm.gateway.fair.order import Order, Policy
from synthia_vllm.gateway.fair.places import displaced
from synthia_vllm.gateway.fair.rate import ServiceRate
from synthia_vllm.gateway.fair.room import Room
from synthia_vllm.gateway.fair.tickets import Ticket, User
from synthia_vllm.gateway.fair.wait import Forecast


class Scheduler:
    """Requests from the queue to their end in the engine: in the order that `Order` says, while there is `Room`."""

    def __init__(
        self,
        capacity: Capacity,
        *,
        policy: Policy = "vtc",
        prompt_cost: float = 1.0,
        generated_cost: float = 2.0,
        ageing: float = 30.0,
        batch_share: float = 0.1,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.policy = policy
        self.counters = Counters(prompt_cost=prompt_cost, generated_cost=generated_cost)
        self.room = Room(capacity)
        self.queued_requests = 0
        self.queued_tokens = 0
        self.clock = clock
        self._users: dict[str, User] = {}  # with requests, waiting or running
        self._in_engine: set[Ticket] = set()
        self._order = Order(
            self.counters, self.room, policy=policy, ageing=ageing, batch_share=batch_share, clock=clock
        )
        self._forecast = Forecast(self._order, self.counters, self.room, clock)
        self.rate = self._forecast.rate
        self.on_wait: Callable[[], None] | None = None  # told of a request that waits where none did
        self._dispatched = [0.0, 0.0]  # cost, by class

    def ticket(self, account: Account, prompt: int, most: int, wake: Callable[[], None]) -> Ticket:
        batch = account.priority == "batch"
        return Ticket(account.user, account.weight, batch, prompt, most, self.clock(), wake)

    def join(self, ticket: Ticket) -> None:
        """Puts a request at the end of its user's queue, and dispatches what has room."""
        user = self._user(ticket)
        ticket.waiting = True
        user.append(ticket)
        self.queued_requests += 1
        self.queued_tokens += ticket.tokens
        if len(user.waiting) == 1:  # behind another of his own it is nobody's turn that was not before
            self._order.come(user)
            self.dispatch()
        self._forecast.look(user)
        if self.on_wait is not None and ticket.waiting and self.queued_requests == 1:
            self.on_wait()

    def admit(self, ticket: Ticket) -> None:
        """Sends a request to the engine at once, room or not: it has had its turn, and room, at another gateway."""
        user = self._user(ticket)
        if not user.waiting:  # as one who joins the queue: nobody comes with credit from elsewhere
            self.counters.lift(user.name, self._order.mates(batch=ticket.batch), batch=ticket.batch)
        ticket.held = self._needed(ticket)
        self._start(ticket)
        self._forecast.look(user)

    def leave(self, ticket: Ticket) -> None:
        """Takes a waiting request out, if it was not yet."""
        if ticket.waiting:
            self._take_out(ticket)
            self.dispatch()  # it may have stood in the way

    def make_place(self, ticket: Ticket, max_requests: int, max_tokens: int) -> bool:
        """Keeps the queue within bounds, for one that has just joined and still waits; False if it is that that goes.

        A queue of one may be of any size.
        """
        requests, tokens = self.queued_requests - max_requests, self.queued_tokens - max_tokens
        if (requests <= 0 and tokens <= 0) or self.queued_requests == 1:
            return True
        gone = displaced(self._users[ticket.user], self._users.values(), requests=requests, tokens=tokens)
        if gone is None:
            return False
        for one in gone:
            self._take_out(one)
            one.wake()
        self.dispatch()
        return True

    def dispatch(self) -> None:
        """Sends requests to the engine while there is room."""
        while (ticket := self._order.next(self._fits)) is not None:
            self._take_out(ticket, stays=True)
            self._start(ticket)
            ticket.wake()
            self._forecast.look(self._users[ticket.user])

    def add_tokens(self, ticket: Ticket, count: int) -> None:
        """Charges tokens that the engine has just generated for a running request."""
        user = self._users[ticket.user]
        cost = served = self.counters.generated_cost * count
        if not ticket.generated and count:
            served += self.counters.prompt_cost * ticket.prompt  # now it is computed: served is what is done
        self._forecast.served(user, served)
        ticket.generated += count
        foreseen = min(ticket.owed, cost)
        self._pay(user, ticket, foreseen)
        if ticket.contended and cost > foreseen:
            self._order.charge(ticket, cost - foreseen)
        self.counters.charge_generated(ticket.user, ticket.weight, count)
        if ticket.generated > ticket.expected:
            held = self.room.held_by(ticket.prompt, ticket.generated)
            self.room.grow(held - ticket.held)
            user.held += held - ticket.held
            ticket.held = held
            ticket.expected = held - ticket.prompt

    def finish(self, ticket: Ticket, *, learn: bool = True) -> None:
        """The engine is done with a request. `learn` is False where its length tells nothing of its user's habits."""
        user = self._users[ticket.user]
        ticket.running = False
        self._in_engine.remove(ticket)
        if ticket.contended:
            self._order.charge(ticket, -ticket.owed)
        self._pay(user, ticket, ticket.owed)
        self.room.give_back(ticket.held)
        user.held -= ticket.held
        user.running -= 1
        if learn:
            self.room.learn(ticket.user, ticket.generated)
        self._forget(user)
        self.counters.forget(self._users)
        self.dispatch()
        self._forecast.look(user)

    def predicted_wait(self, account: Account, prompt: int = 0, most: int = 0) -> float:
        """Seconds that such a request would wait if it came now; 0 where nothing is known yet."""
        room, user = self.room, self._users.get(account.user)
        expected = room.expected_generated(account.user, most)
        fits = room.fits(room.held_by(prompt, expected), newcomer=self._is_newcomer(account.user, account.weight, user))
        if room.lease is not None and self.counters.elsewhere.next == (None, None):
            fits = (
                fits or not self.queued_requests
            )  # of what no gateway waits for, it gets more as soon as it has settled
        cost = self.counters.cost(prompt, expected)
        return self._forecast.wait(account, user, cost, self._in_engine, fits=fits)

    def first(self) -> Ticket | None:
        """The request whose turn it is, whether it has room or not."""
        return self._order.first()

    def told(self, first: Ticket | None) -> Told:
        """What other gateways before the same engines have to know."""
        counters, order = self.counters, self._order
        interactive, batch = order.mates(batch=False), order.mates(batch=True)
        return Told(
            floors=(counters.floor(interactive), counters.floor(batch)),
            last_left=(counters.last_left(batch=False), counters.last_left(batch=True)),
            next=(order.after_next(first, batch=False), order.after_next(first, batch=True)),
            batch_is_due=order.batch_is_due and bool(batch),
            need=(0, 0) if first is None else (self._needed(first), 1),
            owed={user.name: user.owed / user.weight for user in self._users.values() if user.running},
            dispatched=(self._dispatched[False], self._dispatched[True]),
        )

    def learn(self, elsewhere: Elsewhere, interactive: float = 0.0, batch: float = 0.0) -> None:
        """What other gateways told, and the cost that they sent to the engines since the last time."""
        self.counters.elsewhere = elsewhere
        self._order.dispatched_elsewhere(interactive, batch)

    def is_ahead_of_others(self, first: Ticket | None) -> bool:
        """Whether a user who waits at another gateway is further behind than the one of this request."""
        return first is not None and self._order.is_ahead_of_others(first)

    def leave_room(self, seconds: float) -> None:
        """For so long, room that is free is for users of other gateways who are further behind."""
        self._order.leaves_until = self.clock() + seconds

    @property
    def active(self) -> list[str]:
        """Users with requests, waiting or running."""
        return list(self._users)

    @property
    def running(self) -> dict[str, int]:
        """Requests in the engine, by user."""
        return {name: user.running for name, user in self._users.items() if user.running}

    def waiting(self) -> dict[str, int]:
        """Requests in the queue, by user."""
        return {name: len(user.waiting) for name, user in self._users.items() if user.waiting}

    def snapshot(self) -> dict[str, Any]:
        """For the live view."""
        return {
            "policy": self.policy,
            "queued_requests": self.queued_requests,
            "queued_tokens": self.queued_tokens,
            "in_flight_requests": self.room.requests,
            "in_flight_tokens": self.room.tokens,
            "capacity_requests": self.room.capacity.requests,
            "capacity_tokens": self.room.capacity.tokens,
            "lease_requests": self.room.lease and self.room.lease.most.requests,
            "lease_tokens": self.room.lease and self.room.lease.most.tokens,
            "service_rate": self.rate.per_second,
            "users": {
                name: {
                    "queued": len(user.waiting),
                    "in_flight": user.running,
                    "service": self.counters.service.get(name, 0.0),
                }
                for name, user in sorted(self._users.items())
            },
        }

    def _user(self, ticket: Ticket) -> User:
        user = self._users.get(ticket.user)
        if user is None:
            rate = ServiceRate(self.clock)
            user = self._users[ticket.user] = User(ticket.user, ticket.weight, ticket.batch, rate)
            self._forecast.weights += user.weight
        elif not user.waiting:  # an operator may have changed both
            self._forecast.weights += ticket.weight - user.weight
            user.weight, user.batch = ticket.weight, ticket.batch
        return user

    def _start(self, ticket: Ticket) -> None:
        user = self._users[ticket.user]
        ticket.running = True
        self._in_engine.add(ticket)
        ticket.owed = self.counters.cost(0, ticket.expected)
        self.room.take(ticket.held)
        user.running += 1
        user.held += ticket.held
        user.owed += ticket.owed
        self.counters.charge_prompt(ticket.user, ticket.weight, ticket.prompt)
        cost = self.counters.cost(ticket.prompt, ticket.expected)
        self._dispatched[ticket.batch] += cost
        if self._order.contended:
            ticket.contended = True
            self._order.charge(ticket, cost)

    def _needed(self, ticket: Ticket) -> int:
        ticket.expected = self.room.expected_generated(ticket.user, ticket.most)
        return self.room.held_by(ticket.prompt, ticket.expected)

    def _fits(self, ticket: Ticket) -> bool:
        room = self.room
        ticket.held = self._needed(ticket)
        return room.fits(ticket.held, newcomer=self._is_newcomer(ticket.user, ticket.weight, self._users[ticket.user]))

    def _is_newcomer(self, name: str, weight: float, user: User | None) -> bool:
        """Whether what is kept for newcomers is for this user: who has less than half his share of the engine."""
        if user is None or not user.running:
            return name not in self.counters.elsewhere.owed
        return self.room.share(user.held, user.running) < weight / (2 * self._forecast.weights)

    def _take_out(self, ticket: Ticket, *, stays: bool = False) -> None:
        user = self._users[ticket.user]
        ticket.waiting = False
        user.remove(ticket)
        self.queued_requests -= 1
        self.queued_tokens -= ticket.tokens
        if not user.waiting:
            self._order.left(user)
            self._forecast.look(user)
            if not stays:
                self._forget(user)

    def _forget(self, user: User) -> None:
        if not user.waiting and not user.running:
            del self._users[user.name]
            self._forecast.weights -= user.weight

    def _pay(self, user: User, ticket: Ticket, cost: float) -> None:
        ticket.owed -= cost
        user.owed -= cost
