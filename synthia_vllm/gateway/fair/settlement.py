"""What a gateway asks Redis at a settlement with the others, and what it makes of the answer. No asyncio in here."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import sample
from uuid import uuid4

import msgspec
import structlog

from synthia_vllm.gateway.fair.elsewhere import Elsewhere, Told
from synthia_vllm.gateway.fair.scheduler import Scheduler

PERIOD_S = 0.1  # while something is under way or waits, here and with others about
IDLE_S = 1.0
FRESH_S = 5.0  # whose beat stands still for longer is dead
PATIENCE_S = 3.0  # so long a gateway works on what it last knew
_LATE_S = 5 * PERIOD_S  # who has requests waiting settles more often
_LEAVES_S = 3 * PERIOD_S  # so long what others told of their users keeps room free for them
_MOST_LEFT = 2  # settlements at which it was still free; then it is taken all the same
_MOST_USERS = 1000  # of a settlement; the others' turn is in the next ones

_log = structlog.get_logger(__name__)


class Entry(msgspec.Struct):
    """A gateway, as settle.lua keeps it. Tokens and requests come in pairs."""

    beat: int
    group: str
    engines: str
    held: tuple[int, int]
    waits: bool
    most: tuple[int, int] = (0, 0)


class _Question(Entry, kw_only=True):
    need: tuple[int, int]
    room: tuple[int, int]
    dead: dict[str, int]
    users: list[str | float]


class _Answer(msgspec.Struct, array_like=True):
    was_here: bool
    lease: tuple[float, float]
    free: tuple[float, float]
    totals: list[float]


@dataclass(slots=True)
class _Seen:
    """Another gateway."""

    beat: int
    at: float  # when it was first like this
    shares: bool  # engines with this one
    lives: bool = False  # it changed under this one's eyes
    dispatched: tuple[float, float] | None = None


class Settlement:
    """Makes the queue one with those of the other gateways before the same engines.

    Service counts from all gateways: each tells what its users had since it last told, Redis adds it up. What another
    one holds in the engines is taken, and so is what it may still take before it settles again; of what is free each
    has its even part. While Redis is gone for longer than `PATIENCE_S`, or a gateway is about that is before some of
    the engines only, this one takes an even share of them and knows its own users alone: `on_gateways` gets the number
    to divide by, else 1.

    Machines' clocks differ and are set, so that no value has a time in it: who has not raised its beat for `FRESH_S`
    under this one's eyes is dead; sooner who has never raised it, such as the one whose place this one takes.
    """

    def __init__(
        self, scheduler: Scheduler, engines: Sequence[str], on_gateways: Callable[[int], None], *, least: int = 1
    ) -> None:
        self._scheduler = scheduler
        self._engines = frozenset(engines)
        self._group = hashlib.sha256(" ".join(sorted(engines)).encode()).hexdigest()[:16]
        self._id = uuid4().hex
        self.keys = [f"synthia:gateways{name}" for name in ("", f":{self._group}", f":{self._group}:service")]
        self._on_gateways = on_gateways
        self._least = least
        self._beat = 1
        self._sent: dict[str, float] | None = None  # service that Redis is told of until it answers
        self._users: list[str] = []  # that it is asked for
        self._seen: dict[str, _Seen] = {}
        self._dead: dict[str, int] = {}
        self._learned_at = scheduler.clock()
        self._new_until = -math.inf  # Redis has forgotten the others; until then they tell it again
        self._left = 0  # settlements in a row at which others had not taken what was left to them
        self._by = 0
        self._number = 0
        scheduler.counters.unsettled = {}

    @property
    def gateways(self) -> int:
        """Gateways before any of the same engines, this one among them."""
        return 1 + sum(seen.shares for name, seen in self._seen.items() if name not in self._dead)

    @property
    def busy(self) -> bool:
        """Whether others have to know at once what happens here."""
        return self.gateways > 1 and bool(self._scheduler.room.requests or self._scheduler.queued_requests)

    def question(self, *, leaves: bool = False) -> list[str | bytes]:
        """The arguments of settle.lua, which may be asked again where no answer came."""
        scheduler = self._scheduler
        first, most = scheduler.first(), scheduler.room.without_reserve
        told = scheduler.told(first)
        question = _Question(
            beat=self._beat,
            group=self._group,
            engines=" ".join(self._engines),
            held=(scheduler.room.tokens, scheduler.room.requests),
            waits=first is not None and (self._left >= _MOST_LEFT or not scheduler.is_ahead_of_others(first)),
            need=told.need,
            room=(_number(most.tokens), _number(most.requests)),
            dead=self._dead,
            users=self._services(),
        )
        return [self._id, msgspec.msgpack.encode(question), b"" if leaves else msgspec.msgpack.encode(told)]

    def learn(self, answer: Sequence[bytes]) -> None:
        """What settle.lua answered to the last question."""
        scheduler, now = self._scheduler, self._scheduler.clock()
        found = msgspec.msgpack.decode(answer[0], type=_Answer)
        if self._beat > 1 and not found.was_here:
            self._new_until = now + 2 * IDLE_S
        if now - self._learned_at > PATIENCE_S:  # nobody was watched meanwhile
            for seen in self._seen.values():
                seen.at = now
        self._beat, self._sent, self._learned_at = self._beat + 1, None, now
        for user, total in zip(self._users, found.totals, strict=True):
            scheduler.counters.settle(user, total)
        queues, interactive, batch = self._meet(answer[1:], now)
        gateways = self.gateways
        if gateways != self._number:
            self._number = gateways
            _log.info("gateways_share_the_engines", gateways=gateways)
        if now < self._new_until or len(queues) < gateways - 1:
            self._divide(max(gateways, self._least))
            return
        scheduler.learn(elsewhere := Elsewhere.of(queues), interactive, batch)
        scheduler.leave_room(self._patience(elsewhere, found.free))
        if queues:
            scheduler.room.lend(found.lease, found.free, gateways)
        else:
            scheduler.room.lease = None
        self._set_part(1)
        scheduler.dispatch()

    def lost(self) -> bool:
        """Redis did not answer; returns whether this gateway goes on by itself now."""
        alone = not self._by or self._scheduler.clock() - self._learned_at > PATIENCE_S
        if alone:
            self._divide(max(self.gateways, self._least))
        self._scheduler.dispatch()  # into room that was left to others
        return alone

    def _services(self) -> list[str | float]:
        """For each user that matters here: name, service as others know it, and more of it."""
        counters = self._scheduler.counters
        if self._sent is None:
            self._sent = counters.take_unsettled(_MOST_USERS)
        others = [user for user in self._scheduler.active if user not in self._sent]
        self._users = [*self._sent, *(others if len(others) <= _MOST_USERS else sample(others, _MOST_USERS))]
        found: list[str | float] = []
        for user in self._users:
            more = self._sent.get(user, 0.0)
            found += user, max(0.0, counters.settled(user) - more), more
        return found

    def _meet(self, told: Sequence[bytes], now: float) -> tuple[list[Told], float, float]:
        """The queues of those before the very same engines, and the cost that they have dispatched since the last time.

        By class: interactive, batch.
        """
        queues: list[Told] = []
        interactive = batch = 0.0
        here = set()
        for word, packed, queue in zip(*(iter(told),) * 3, strict=True):
            entry, name = msgspec.msgpack.decode(packed, type=Entry), word.decode()
            here.add(name)
            seen = self._seen.get(name)
            if seen is None:
                shares = not self._engines.isdisjoint(entry.engines.split())
                seen = self._seen[name] = _Seen(entry.beat, now, shares)
            elif seen.beat != entry.beat:
                seen.beat, seen.at, seen.lives = entry.beat, now, True
                self._dead.pop(name, None)
            elif now - seen.at > (FRESH_S if seen.lives else 2 * IDLE_S):
                self._dead[name] = entry.beat
            if queue and name not in self._dead:
                one = msgspec.msgpack.decode(queue, type=Told)
                if now - seen.at > _LATE_S:  # nobody is at hand to take what would be left
                    one = msgspec.structs.replace(one, floors=(None, None), next=(None, None), batch_is_due=False)
                queues.append(one)
                before = seen.dispatched or one.dispatched
                interactive += one.dispatched[False] - before[False]
                batch += one.dispatched[True] - before[True]
                seen.dispatched = one.dispatched
        if now >= self._new_until:
            for name in self._seen.keys() - here:
                del self._seen[name]
                self._dead.pop(name, None)
        return queues, interactive, batch

    def _patience(self, elsewhere: Elsewhere, free: Sequence[float]) -> float:
        """Seconds for which free room is left to others: none where they did not take it the last times."""
        if not self._scheduler.is_ahead_of_others(self._scheduler.first()):
            self._left = 0
        elif all(left >= need for left, need in zip(free, elsewhere.need, strict=True)):
            self._left += 1
        if self._left > _MOST_LEFT:
            self._left = 0
            return 0.0
        return _LEAVES_S

    def _divide(self, by: int) -> None:
        """Takes an even share of the engines, and looks after its own users alone."""
        self._scheduler.room.lease = None
        self._scheduler.learn(Elsewhere())
        self._set_part(by)

    def _set_part(self, by: int) -> None:
        if by != self._by:
            self._by = by
            self._on_gateways(by)


def _number(most: int | None) -> int:
    return -1 if most is None else most
