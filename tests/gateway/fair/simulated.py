"""A simulated engine for the scheduler: each step gives every running request one token. For order, not for speed."""

from collections import defaultdict

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.fair.tickets import Ticket


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedEngine:
    def __init__(self, capacity: Capacity, *, step_s: float = 0.1, **options: object) -> None:
        self.clock = Clock()
        self.scheduler = Scheduler(capacity, clock=self.clock, **options)  # type: ignore[arg-type]
        self.step_s = step_s
        self.running: list[Ticket] = []
        self.order: list[Ticket] = []
        self.service: dict[str, float] = defaultdict(float)  # cost / weight, by user
        self.lengths: dict[Ticket, int] = {}

    def submit(self, account: Account, prompt: int = 10, most: int = 20, length: int | None = None) -> Ticket:
        """A request that will generate `length` tokens (default: as many as it may)."""
        ticket = self.scheduler.ticket(account, prompt, most, lambda: self._start(ticket))
        self.lengths[ticket] = length or most
        self.scheduler.join(ticket)
        return ticket

    def step(self) -> None:
        self.clock.now += self.step_s
        for ticket in list(self.running):
            self.scheduler.add_tokens(ticket, 1)
            self.service[ticket.user] += 2 / ticket.weight
            if ticket.generated == self.lengths[ticket]:
                self.running.remove(ticket)
                self.scheduler.finish(ticket)
                self._finished(ticket)

    def run(self) -> None:
        while self.running:
            self.step()

    def _finished(self, ticket: Ticket) -> None:
        """For users who ask again."""

    def _start(self, ticket: Ticket) -> None:
        self.running.append(ticket)
        self.order.append(ticket)
        self.service[ticket.user] += ticket.prompt / ticket.weight
