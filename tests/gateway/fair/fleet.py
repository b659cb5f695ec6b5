"""Several schedulers before one simulated engine, in virtual time; they settle through a real Redis."""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.resources import files

import redis

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair import scheduler as scheduler_module
from synthia_vllm.gateway.fair.peers import share
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.fair.settlement import IDLE_S, PERIOD_S, Settlement
from synthia_vllm.gateway.fair.tickets import Ticket
from tests.gateway.fair.simulated import Clock

SCRIPT = (files(scheduler_module.__package__) / "settle.lua").read_text()
TICK_S = 0.025  # between two looks at who is to settle
STEP_S = 0.1  # of the engine: each running request gets a token


@dataclass(frozen=True)
class Load:
    """A user who keeps so many requests under way."""

    account: Account
    streams: int
    prompt: int
    most: int
    home: int | None = None  # the gateway that has all of them; None: any
    begins: float = 0.0


@dataclass(eq=False)
class Member:
    """One gateway of the fleet."""

    scheduler: Scheduler
    settlement: Settlement
    due: float = 0.0  # its next settlement
    running: dict[Ticket, Load] = field(default_factory=dict)
    waiting: dict[Ticket, Load] = field(default_factory=dict)


class Fleet:
    def __init__(self, url: str, capacity: Capacity, loads: list[Load], *, gateways: int = 4, seed: int = 0) -> None:
        self.clock = Clock()
        self.redis = redis.Redis.from_url(url)
        self.redis.flushall()
        self.script = self.redis.register_script(SCRIPT)
        self.redis_answers = True
        self.capacity = capacity
        self.random = random.Random(seed)
        self.service: dict[str, float] = defaultdict(float)
        self.most = 0  # tokens that the gateways held at once
        self.most_requests = 0
        self.used: list[float] = []  # part of the capacity, at each step
        self.settlements = 0
        self._next = {load: [load.begins] * load.streams for load in loads}
        self._ticks = 0
        self.members = [self.member() for _ in range(gateways)]

    def member(self) -> Member:
        scheduler = Scheduler(self.capacity, clock=self.clock)

        def set_gateways(number: int) -> None:
            scheduler.room.capacity = share(self.capacity, number)
            scheduler.dispatch()

        member = Member(scheduler, Settlement(scheduler, ["engine"], set_gateways))

        def hurry() -> None:
            member.due = min(member.due, self.clock.now)

        scheduler.on_wait = hurry
        self.settle(member)
        return member

    def kill(self, number: int) -> None:
        """Without a word; another one takes its place."""
        dead = self.members[number]
        for load in (*dead.running.values(), *dead.waiting.values()):
            self._next[load].append(self.clock.now + 2 * TICK_S)
        self.members[number] = self.member()

    def run(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.tick()

    def tick(self) -> None:
        self._ticks += 1
        self.clock.now += TICK_S
        for load, times in self._next.items():
            due = [at for at in times if at <= self.clock.now]
            self._next[load] = [at for at in times if at > self.clock.now]
            for _ in due:
                self.submit(load)
        for member in self.random.sample(self.members, len(self.members)):
            if member.due <= self.clock.now:
                self.settle(member)
        if self._ticks % round(STEP_S / TICK_S) == 0:
            self.step()
        self.most = max(self.most, self.held)
        self.most_requests = max(self.most_requests, sum(one.scheduler.room.requests for one in self.members))

    @property
    def held(self) -> int:
        return sum(member.scheduler.room.tokens for member in self.members)

    def settle(self, member: Member) -> None:
        self.settlements += 1
        question = member.settlement.question()
        if self.redis_answers:
            member.settlement.learn(self.script(keys=member.settlement.keys, args=question))
        else:
            member.settlement.lost()
        member.due = self.clock.now + (PERIOD_S if member.settlement.busy else IDLE_S)

    def step(self) -> None:
        for member in self.members:
            for ticket, load in list(member.running.items()):
                member.scheduler.add_tokens(ticket, 1)
                self.service[ticket.user] += 2.0 / ticket.weight
                if ticket.generated == load.most:
                    del member.running[ticket]
                    member.scheduler.finish(ticket)
                    self._next[load].append(self.clock.now)
        if self.capacity.tokens:
            self.used.append(self.held / self.capacity.tokens)

    def submit(self, load: Load) -> Ticket:
        member = self.members[self.random.randrange(len(self.members)) if load.home is None else load.home]
        ticket = member.scheduler.ticket(load.account, load.prompt, load.most, lambda: self._start(member, ticket))
        member.waiting[ticket] = load
        member.scheduler.join(ticket)
        return ticket

    def _start(self, member: Member, ticket: Ticket) -> None:
        member.running[ticket] = member.waiting.pop(ticket)
        self.service[ticket.user] += ticket.prompt / ticket.weight
