"""Whose turn it is among those who wait."""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Literal

from synthia_vllm.gateway.fair.counters import Counters
from synthia_vllm.gateway.fair.room import Room
from synthia_vllm.gateway.fair.tickets import Ticket, User

Policy = Literal["vtc", "fcfs"]

# So long may smaller requests pass one that has no room, before room is kept free for it.
_PASSING_S = 2.0
# Of what the engines hold: so far a user may be ahead of those at other gateways. What is told of them is old by a
# settlement, in which each may have got several requests: without slack all would leave room to all.
_SLACK = 1 / 16


class Order:
    """Users with waiting requests, by class, and which request is next.

    vtc: the user with the least service. Interactive users go before batch users; once a batch request has waited
    `ageing` seconds, batch gets `batch_share` of the service, and one user of it the turn as among the interactive.
    fcfs: in the order of arrival, whoever asks.

    Of several gateways before the same engines each has its own order, and leaves free room to users of another one who
    are further behind.
    """

    def __init__(
        self,
        counters: Counters,
        room: Room,
        *,
        policy: Policy,
        ageing: float,
        batch_share: float,
        clock: Callable[[], float],
    ) -> None:
        self.policy = policy
        self.ageing = ageing
        self.batch_share = batch_share
        self.contended = False  # batch claims its share of what interactive users wait for
        self.batch_is_due = False  # and has not had it
        self.leaves_until = -math.inf  # until then, free room is left to users of other gateways who are further behind
        self._classes: dict[bool, dict[str, User]] = {False: {}, True: {}}  # batch or not
        self._batch_lead = 0.0  # cost that batch had beyond its share
        self._counters = counters
        self._room = room
        self._clock = clock

    def __bool__(self) -> bool:
        return any(self._classes.values())

    def mates(self, *, batch: bool) -> dict[str, User]:
        """The users of a class who wait."""
        return self._classes[batch]

    def come(self, user: User) -> None:
        """A user waits who did not."""
        mates = self._classes[user.batch]
        self._counters.lift(user.name, mates, batch=user.batch)
        mates[user.name] = user

    def left(self, user: User) -> None:
        """A user has no waiting request any more."""
        del self._classes[user.batch][user.name]
        self._counters.left_queue(user.name, batch=user.batch)

    def next(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """The request to send to the engine now; None where nobody waits, or there is no room for who is next."""
        first = self.first()
        leaves = self._clock() <= self.leaves_until
        if first is None or (leaves and self.is_ahead_of_others(first)):
            return None
        if fits(first):
            return first
        return None if self.policy == "fcfs" else self._passing(first, fits)

    def is_ahead_of_others(self, ticket: Ticket) -> bool:
        """Whether another gateway has a user waiting who is clearly further behind than the one of this request."""
        elsewhere = self._counters.elsewhere
        if elsewhere.next == (None, None) or self.policy == "fcfs":
            return False
        if not ticket.batch and elsewhere.batch_is_due:
            return True
        if ticket.batch and elsewhere.next[False] is not None and not self.batch_is_due:
            return True
        place = elsewhere.next[ticket.batch]
        if place is None:
            return False
        room = self._room  # where engines tell no tokens: what is held here
        slack = self._counters.cost(0, (room.capacity.tokens or room.tokens) * _SLACK)
        return self.place(self._classes[ticket.batch][ticket.user]) > place + slack

    def after_next(self, first: Ticket | None, *, batch: bool) -> float | None:
        """The place of a class's next user, as it will be when he has had his request; None where nobody waits.

        `first` is the request whose turn it is, of either class.
        """
        mates = self._classes[batch]
        if not mates:
            return None
        user = mates[first.user] if first and first.batch == batch else min(mates.values(), key=self._key)
        head = user.waiting[0]
        cost = self._counters.cost(head.prompt, self._room.expected_generated(user.name, head.most))
        return self.place(user) + cost / user.weight

    def until_contended(self) -> float:
        """Seconds until batch may claim its share, if a request came now and the interactive went on."""
        first = min((user.waiting[0].joined for user in self._classes[True].values()), default=self._clock())
        return max(0.0, first + self.ageing - self._clock())

    def charge(self, ticket: Ticket, cost: float) -> None:
        """Cost of a request that got its turn while the classes contended, or a correction of it."""
        share = self.batch_share
        self._batch_lead += (1 - share) * cost if ticket.batch else -share * cost

    def dispatched_elsewhere(self, interactive: float, batch: float) -> None:
        """Cost that other gateways have sent to the engines: batch's share is of all of it."""
        if self.contended:
            self._batch_lead += (1 - self.batch_share) * batch - self.batch_share * interactive

    def place(self, user: User) -> float:
        """What is lowest goes first: service had, and service under way as far as it can be predicted.

        Without the second part, all places that come free go to one user until its tokens have streamed, then all to
        another: fair over minutes only (the paper's section on length prediction).
        """
        counters = self._counters
        return counters.service[user.name] + user.owed / user.weight + counters.elsewhere.owed.get(user.name, 0.0)

    def _key(self, user: User) -> tuple[float, int, float]:
        return self.place(user), user.running, user.waiting[0].joined

    def first(self) -> Ticket | None:
        """The request whose turn it is, whether it has room or not."""
        interactive, batch = self._classes[False], self._classes[True]
        if self.policy == "fcfs":
            heads = [user.waiting[0] for users in (interactive, batch) for user in users.values()]
            return min(heads, key=attrgetter("joined"), default=None)
        among = batch if self._batch_is_due(interactive, batch) else interactive
        return min(among.values(), key=self._key).waiting[0] if among else None

    def _batch_is_due(self, interactive: dict[str, User], batch: dict[str, User]) -> bool:
        latest = self._clock() - self.ageing
        before = self.contended
        others = interactive or self._counters.elsewhere.next[False] is not None
        self.contended = bool(others) and any(user.waiting[0].joined <= latest for user in batch.values())
        if self.contended and not before:
            self._batch_lead = max(self._batch_lead, 0.0)  # a share is not saved up
        self.batch_is_due = self.contended and self._batch_lead <= 0.0
        return not interactive or self.batch_is_due

    def _passing(self, first: Ticket, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """One that has room where the first in line has none: it need not stay empty until there is enough.

        Bounded in time, and in service: who passes stays within what counters may differ by anyway.
        """
        now = self._clock()
        leaves = now <= self.leaves_until
        if first.stuck is None:
            first.stuck = now
        if now - first.stuck > _PASSING_S:
            return None
        counters = self._counters
        most = counters.service[first.user] + counters.cost(0, self._room.capacity.tokens or math.inf)
        # A batch request that has its turn by its share is passed by interactive ones, which have their own counters.
        mates = self._classes[False] or self._classes[True]
        heads = [user.waiting[0] for user in mates.values()]
        fitting = [head for head in heads if fits(head) and not (leaves and self.is_ahead_of_others(head))]
        for user in sorted((mates[head.user] for head in fitting), key=self._key):
            head = user.waiting[0]
            if head.batch != first.batch:
                return head
            if self.place(user) + counters.cost(head.prompt, head.expected) / user.weight <= most:
                return head
        return None
