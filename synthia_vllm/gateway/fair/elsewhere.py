"""What gateways before the same engines tell each other of their queues."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

ByClass = tuple[float | None, float | None]  # of interactive and of batch users; None: nobody waits


class Told(msgspec.Struct, array_like=True):
    """One gateway's queue. Service, places and what is owed are costs over weights."""

    floors: ByClass = (None, None)  # least service of the users who wait
    last_left: tuple[float, float] = (0.0, 0.0)  # service of the user who was the last to leave the queue
    next: ByClass = (None, None)  # place of the user who is next, as it will be after that request
    batch_is_due: bool = False  # batch has its turn before interactive, by its share
    need: tuple[int, int] = (0, 0)  # tokens and requests of the next request
    owed: dict[str, float] = {}  # predicted cost of what a user's running requests have still to generate
    dispatched: tuple[float, float] = (0.0, 0.0)  # cost, since the gateway began


@dataclass(slots=True)
class Elsewhere:
    """The queues of the other gateways, taken together. As it is made, it stands for there being none."""

    floors: ByClass = (None, None)
    last_left: tuple[float, float] = (0.0, 0.0)
    next: ByClass = (None, None)
    batch_is_due: bool = False
    need: tuple[int, int] = (0, 0)  # of the gateway whose user is furthest behind
    owed: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, queues: Iterable[Told]) -> "Elsewhere":
        queues = list(queues)
        owed: dict[str, float] = {}
        for queue in queues:
            for user, cost in queue.owed.items():
                owed[user] = owed.get(user, 0.0) + cost
        waiting = [queue for queue in queues if queue.next != (None, None)]
        first = min(waiting, key=_first, default=Told())
        return cls(
            floors=_least(queue.floors for queue in queues),
            last_left=(
                max((queue.last_left[False] for queue in queues), default=0.0),
                max((queue.last_left[True] for queue in queues), default=0.0),
            ),
            next=_least(queue.next for queue in queues),
            batch_is_due=any(queue.batch_is_due for queue in waiting),
            need=first.need,
            owed=owed,
        )


def _first(queue: Told) -> tuple[bool, float]:
    """Interactive users before batch, unless it is batch's turn."""
    interactive, batch = queue.next
    if interactive is None or (queue.batch_is_due and batch is not None):
        return not queue.batch_is_due, batch or 0.0
    return False, interactive


def _least(found: Iterable[ByClass]) -> ByClass:
    pairs = list(found)
    interactive = [one for one, _ in pairs if one is not None]
    batch = [one for _, one in pairs if one is not None]
    return min(interactive, default=None), min(batch, default=None)
