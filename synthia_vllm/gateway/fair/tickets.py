"""What is under way: requests from joining the queue to their end, and the users whose they are."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from synthia_vllm.gateway.fair.rate import ServiceRate


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place, from joining the queue to its end."""

    user: str
    weight: float
    batch: bool
    prompt: int  # tokens
    most: int  # tokens that it may generate
    joined: float
    wake: Callable[[], None]  # called once, when it is its turn, or when it has lost its place in the queue
    waiting: bool = False
    running: bool = False
    stuck: float | None = None  # since when it is first in line and has no room
    generated: int = 0
    held: int = 0  # tokens of KV cache that it counts with
    expected: int = 0  # generated tokens that `held` covers
    owed: float = 0.0  # predicted cost of what it has still to generate
    contended: bool = False  # it got its turn while batch claimed its share

    @property
    def tokens(self) -> int:
        return self.prompt + self.most


@dataclass(slots=True, eq=False)
class User:
    """A user with requests waiting, first in first out, or in the engine."""

    name: str
    weight: float
    batch: bool
    rate: ServiceRate  # of what he got while he waited
    waiting: deque[Ticket] = field(default_factory=deque)
    prompt: int = 0  # tokens of what waits
    most: int = 0  # tokens that this may generate
    running: int = 0  # requests in the engine
    held: int = 0  # tokens of its KV cache that they count with
    owed: float = 0.0  # predicted cost of what they have still to generate

    def append(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)
        self.prompt += ticket.prompt
        self.most += ticket.most

    def remove(self, ticket: Ticket) -> None:
        self.waiting.remove(ticket)  # of two that are alike it is the one itself: tickets are equal to nothing else
        self.prompt -= ticket.prompt
        self.most -= ticket.most
