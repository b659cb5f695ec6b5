"""Virtual Token Counter: how much service each user has had.

Sheng et al., *Fairness in Serving Large Language Models*, OSDI 2024, algorithm 2 and section 4.3 (weights).
"""

from collections.abc import Collection, Iterable

# Beyond this many users, those without a request are forgotten, least served first: they would be lifted anyway.
_MAX_REMEMBERED = 10_000


class Counters:
    """Service of each user: cost of its tokens over its weight. Never falls."""

    def __init__(self, *, prompt_cost: float, generated_cost: float) -> None:
        self.prompt_cost = prompt_cost
        self.generated_cost = generated_cost
        self.service: dict[str, float] = {}
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
        floor = min((self.service[other] for other in queued), default=None)
        if floor is None:
            floor = self.service.get(self._last_left.get(batch, ""), 0.0)
        return max(self.service.get(user, 0.0), floor)

    def charge_prompt(self, user: str, weight: float, tokens: int) -> None:
        """At dispatch."""
        self.service[user] += self.prompt_cost * tokens / weight

    def charge_generated(self, user: str, weight: float, tokens: int) -> None:
        """As tokens stream."""
        self.service[user] += self.generated_cost * tokens / weight

    def left_queue(self, user: str, *, batch: bool) -> None:
        """The user has no waiting request any more."""
        self._last_left[batch] = user

    def forget(self, active: Collection[str]) -> None:
        """Bounds memory."""
        if len(self.service) <= _MAX_REMEMBERED:
            return
        kept = {*active, *self._last_left.values()}
        idle = sorted((user for user in self.service if user not in kept), key=self.service.__getitem__)
        for user in idle[: len(idle) // 2]:
            del self.service[user]
