"""How long a request would wait."""

from collections.abc import Callable, Collection, Mapping

from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair.counters import Counters
from synthia_vllm.gateway.fair.order import Order
from synthia_vllm.gateway.fair.rate import ServiceRate
from synthia_vllm.gateway.fair.room import Room
from synthia_vllm.gateway.fair.tickets import Ticket, User


class Forecast:
    """Measures how fast the engine serves all, each class, and each user who waits, and makes waits of it.

    In a class's own rate is what the other class takes, and in a user's own is who else goes on asking: how many of
    those who wait now will be back, no queue tells.
    """

    def __init__(self, order: Order, counters: Counters, room: Room, clock: Callable[[], float]) -> None:
        self.rate = ServiceRate(clock)
        self.weights = 0.0  # of all users with requests, waiting or running
        self._by_class = {False: ServiceRate(clock), True: ServiceRate(clock)}
        self._order = order
        self._counters = counters
        self._room = room

    def served(self, user: User, cost: float) -> None:
        self.rate.served += cost
        self._by_class[user.batch].served += cost
        user.rate.served += cost

    def look(self, user: User) -> None:
        """Whenever requests come and go; `user` is whose."""
        self.rate.look(bool(self._order))
        for batch, rate in self._by_class.items():
            rate.look(bool(self._order.mates(batch=batch)))
        user.rate.look(bool(user.waiting))

    def wait(
        self, account: Account, user: User | None, cost: float, running: Collection[Ticket], *, fits: bool
    ) -> float:
        """Seconds for a request of this cost, for which there is room now or not; 0 where nothing is known yet."""
        rate = self.rate.per_second
        queued = self._queued(account, user, rate) if rate else 0.0
        if not rate or (not queued and fits):
            return 0.0
        return self._until_free(rate * queued + cost, running, rate)

    def _until_free(self, cost: float, running: Collection[Ticket], rate: float) -> float:
        """Seconds until so much has been taken from the queue: places come free as what runs now ends."""
        each = rate / max(1, len(running))
        free = 0.0
        for seconds, size in sorted(self._left(ticket, each) for ticket in running):
            free += size
            if free >= cost:
                return seconds
        return cost / rate

    def _left(self, ticket: Ticket, rate: float) -> tuple[float, float]:
        """Seconds that a request still runs at this rate, and its cost in all."""
        generated = self._counters.cost(0, ticket.expected)
        cost = self._counters.cost(ticket.prompt, ticket.expected)
        return (ticket.owed / generated * cost / rate if generated else 0.0), cost

    def _queued(self, account: Account, user: User | None, rate: float) -> float:
        """Seconds for all that goes before a new request of this user."""
        order = self._order
        interactive, batch = order.mates(batch=False), order.mates(batch=True)
        if order.policy == "fcfs":
            return self._backlog(*interactive.values(), *batch.values()) / rate
        if account.priority != "batch":
            return self._among(account, user, interactive, self._by_class[False].per_second or rate)
        pace = (self._by_class[True].per_second if batch else None) or rate
        if not interactive:
            return self._among(account, user, batch, pace)
        # Batch goes when the interactive are done, unless its share comes first.
        last = self._backlog(*interactive.values()) / rate + self._among(account, user, batch, rate)
        share = order.until_contended() + self._among(account, user, batch, order.batch_share * rate)
        return min(share, max(last, self._among(account, user, batch, pace)))

    def _among(self, account: Account, user: User | None, mates: Mapping[str, User], rate: float) -> float:
        """Seconds within the class, which is served at this rate.

        Others are served until their places reach where the user's own queue takes his: once (at least), or, if all go
        on asking, as his weight among theirs has it (at most). Between the two, what he got of late tells.
        """
        if user is None or not user.waiting:
            start = self._counters.lifted(account.user, mates, batch=account.priority == "batch")
            start += user.owed / user.weight if user else 0.0
            return self._ahead(mates, account.user, start) / rate
        start, own = self._order.place(user), self._backlog(user)
        before = self._ahead(mates, account.user, start) / rate
        once = (own + self._ahead(mates, account.user, start + own / user.weight)) / rate
        always = before + own / rate * self.weights / user.weight
        lately = before + own / user.rate.per_second if user.rate.per_second else once
        return max(once, min(always, lately))

    def _ahead(self, mates: Mapping[str, User], own: str, place: float) -> float:
        """Cost of what others have waiting that goes before this user does at this place."""
        return sum(
            min(self._backlog(mate), (place - at) * mate.weight)
            for name, mate in mates.items()
            if (at := self._order.place(mate)) < place and name != own
        )

    def _backlog(self, *users: User) -> float:
        """Cost of what these have waiting."""
        expected = self._room.expected_generated
        return sum(
            self._counters.cost(user.prompt, expected(user.name, user.most, len(user.waiting))) for user in users
        )
