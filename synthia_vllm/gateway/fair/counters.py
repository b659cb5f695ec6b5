"""Virtual Token Counter: how much service each user has had.

Sheng et al., *Fairness in Serving Large Language Models*, OSDI 2024, algorithm 2 and section 4.3 (weights).
"""

from collections.abc import Collection, Iterable
from itertools import islice

from synthia_vllm.gateway.fair.elsewhere import Elsewhere

# Beyond this many users, those without a request are forgotten, least served first: they would be lifted anyway.
_MAX_REMEMBERED = 10_000


class Counters:
    """Service of each user: cost of its tokens over its weight. Never falls.

    With other gateways before the same engines it is from all of them, as far as they have told.
    """

    def __init__(self, *, prompt_cost: float, generated_cost: float) -> None:
        self.prompt_cost = prompt_cost
        self.generated_cost = generated_cost
        self.service: dict[str, float] = {}
        self.elsewhere = Elsewhere()
        self.unsettled: dict[str, float] | None = None  # service that the others don't know of; None: nobody asks
        self._last_left: dict[bool, str] = {}  # by class

    def cost(self, prompt: int, generated: float) -> float:
        return self.prompt_cost * prompt + self.generated_cost * generated

    def lift(self, user: str, queued: Iterable[str], *, batch: bool) -> None:
        """For a user that comes back to the queue: credit is not saved up while away.

        `queued` are the users of the same class with waiting requests, without this one: the other class is served at
        another pace, and its counters say nothing.
        """
        self.service[user] = self.lifted(user, queued, batch=batch)

    def lifted(self, user: str, queued: Iterable[str], *, batch: bool) -> float:
        """Where `lift` would take a user's counter."""
        floor = self.floor(queued)
        elsewhere = self.elsewhere.floors[batch]
        if elsewhere is not None and (floor is None or elsewhere < floor):
            floor = elsewhere
        if floor is None:
            floor = max(self.last_left(batch=batch), self.elsewhere.last_left[batch])
        return max(self.service.get(user, 0.0), floor)

    def floor(self, users: Iterable[str]) -> float | None:
        """The least service that one of them has had; None of nobody."""
        return min((self.service[user] for user in users), default=None)

    def charge_prompt(self, user: str, weight: float, tokens: int) -> None:
        """At dispatch."""
        self._charge(user, self.prompt_cost * tokens / weight)

    def charge_generated(self, user: str, weight: float, tokens: int) -> None:
        """As tokens stream."""
        self._charge(user, self.generated_cost * tokens / weight)

    def left_queue(self, user: str, *, batch: bool) -> None:
        """The user has no waiting request any more."""
        self._last_left[batch] = user

    def last_left(self, *, batch: bool) -> float:
        """Service of the user who was the last to leave the queue."""
        return self.service.get(self._last_left.get(batch, ""), 0.0)

    def take_unsettled(self, most: int) -> dict[str, float]:
        """Service of at most so many users that the others are to be told of now."""
        if self.unsettled is None:
            self.unsettled = {}
        return {user: self.unsettled.pop(user) for user in list(islice(self.unsettled, most))}

    def settled(self, user: str) -> float:
        """A user's service without what is unsettled."""
        return self.service.get(user, 0.0) - (self.unsettled or {}).get(user, 0.0)

    def settle(self, user: str, total: float) -> None:
        """All gateways together gave this user so much, what is unsettled here not counted."""
        total += (self.unsettled or {}).get(user, 0.0)
        self.service[user] = max(self.service.get(user, 0.0), total)

    def forget(self, active: Collection[str]) -> None:
        """Bounds memory."""
        if len(self.service) <= _MAX_REMEMBERED:
            return
        kept = {*active, *self._last_left.values(), *(self.unsettled or ())}
        idle = sorted((user for user in self.service if user not in kept), key=self.service.__getitem__)
        for user in idle[: len(idle) // 2]:
            del self.service[user]

    def _charge(self, user: str, service: float) -> None:
        self.service[user] += service
        if self.unsettled is not None:
            self.unsettled[user] = self.unsettled.get(user, 0.0) + service
