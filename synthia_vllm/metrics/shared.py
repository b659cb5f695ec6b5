"""One `/metrics` for several gateways: each publishes what it counts, and tells the sum of all."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from uuid import uuid4

import structlog

from synthia_vllm.metrics.cells import Cap, Table
from synthia_vllm.metrics.series import OTHER
from synthia_vllm.metrics.snapshot import Snapshot, Sums, ToldLabels
from synthia_vllm.redis_client import REDIS_GONE, open_redis
from synthia_vllm.supervise import stop, supervise

PERIOD_S = 1.0  # how often each publishes: what one that is killed has counted since is lost
FRESH_S = 5.0  # who has not published for so long is gone, and its gauges with it
FOLD_S = 60.0  # and then its counts become part of one sum for all that are gone
JOIN_S = 600.0  # how often the engines are told whose they are: that is kept for a day
_KEPT_S = 86_400.0  # as in shared.lua
_GONE = "gone"
_PREFIX = "{synthia:metrics}"  # one hash tag: a script's keys are on one node of a Redis cluster

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Publication:
    number: int
    snapshot: Snapshot
    text: bytes


@dataclass(frozen=True, slots=True)
class _Seen:
    number: int
    at: float  # by this process' clock, when it was first this


class SharedMetrics:
    """What all gateways before the same engines have counted, in Redis (shared.lua).

    Each publishes a snapshot under an id of its own, once a second, when it is asked and at its end. Who is asked adds
    up what is published, its own too, and nothing else: so no answer is behind another one, whichever gateway gave it.
    Who has not published for `FRESH_S`, under this one's eyes and by this one's clock, is gone: its counters stay, its
    gauges go. After `FOLD_S` whoever sees it first adds its counters to those of all that are gone. One that only stood
    still finds that out when it publishes, and goes on from there under another id.

    Which gateways belong together, their engines tell: any one in common is enough. Names of users and models are told
    up to a number that holds for all gateways together.

    While Redis is gone, the last sums of the others stand, and this one's own counts go on.
    """

    def __init__(
        self,
        url: str,
        engines: Sequence[str],
        own: Callable[[], Iterable[Table]],
        names: Mapping[str, Cap],
        *,
        timeout: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engines`: the same text at all gateways before one engine. `names`: the values of a label, by label."""
        self.gateways = 1  # living ones that `tables` tells of
        self._redis = open_redis(url, timeout)
        self._script = self._redis.register_script(files(__package__).joinpath("shared.lua").read_text())
        self._engines = [f"{_PREFIX}:of:{engine}" for engine in engines]
        self._own = own
        self._caps = names
        self._names: dict[str, dict[str, str]] = {label: {OTHER: OTHER} for label in names}  # as which each is told
        self._told = ToldLabels(lambda label, name: self._names[label].get(name))
        self._clock = clock
        self._group = ""
        self._joined = 0.0
        self._id = uuid4().hex
        self._base = Snapshot()  # what this process has told under earlier ids
        self._known = _Publication(0, Snapshot(), b"")  # what Redis has of this one
        self._unsure: _Publication | None = None  # what it may have: it did not answer
        self._answered = clock()
        self._seen: dict[str, _Seen] = {}
        self._texts: dict[str, bytes] = {}  # what Redis had when it was read last
        self._decoded: dict[str, Snapshot] = {}
        self._sums = Sums()
        self._lost = False
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "SharedMetrics":
        await self.refresh()
        self._task = supervise("shared_metrics", self._keep)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await stop(self._task)
        async with self._lock:
            await self._guarded(self._publish(left=True))
        await self._redis.aclose()

    @property
    def tables(self) -> Mapping[str, Table]:
        """The sums as they were at the last `refresh`, by family."""
        return self._sums.tables

    async def refresh(self) -> None:
        """Publishes what has been counted until now, and adds up what all have. No error where Redis is gone."""
        async with self._lock:  # an older sum must not come after a newer one
            if not self._lost:
                await self._guarded(self._publish(everything=True))
            await self._add_up()

    async def step(self) -> None:
        """What is done once a second: publishes, looks who is there, and folds those that have long been gone."""
        async with self._lock:
            if self._lost and not await self._answers():
                return
            if await self._guarded(self._publish()) is None or not self._old():
                return
            if await self._guarded(self._publish(everything=True)):
                for name in self._old():
                    await self._guarded(self._fold(name))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.step()

    async def _answers(self) -> bool:
        """Asked of a Redis that was gone, before anything is published: the loss of this leaves nothing in doubt."""
        try:
            return bool(await self._redis.ping())
        except REDIS_GONE:
            return False

    async def _guarded(self, asking: Awaitable[bool]) -> bool | None:
        """None where Redis is gone."""
        try:
            found = await asking
        except REDIS_GONE as error:
            if not self._lost:
                _log.error("metrics_not_shared", error=str(error))
            self._lost, self._joined = True, 0.0
            return None
        if self._lost:
            _log.warning("metrics_shared_again")
            self._lost = False
        return found

    async def _publish(self, *, everything: bool = False, left: bool = False) -> bool:
        if not self._joined or self._clock() - self._joined > JOIN_S:
            await self._join()
        await self._admit()
        anew = late = False  # late: this is one that was not answered; what has been counted since comes after it
        while True:
            if self._unsure is None:
                late, now = False, await self._counted()
                self._unsure = _Publication(self._known.number + 1, now, await now.encode())
            else:
                late = not anew
            asked = self._unsure
            text = b"" if asked.text == self._known.text and not anew else asked.text
            answer = await self._ask(
                "publish", self._id, asked.number, text, int(left and not late), int(everything), int(anew)
            )
            if answer[0] == b"folded":
                await self._begin_anew(int(answer[1]))
            elif answer[0] == b"missing":
                # So long away, it has been folded, and nobody remembers that; else Redis is empty.
                if self._clock() - self._answered > _KEPT_S / 2:
                    await self._begin_anew(asked.number)
                else:
                    await self._restore()
                    anew = True
            else:
                self._known, self._unsure, anew = asked, None, False
                self._answered = self._clock()
                if not late:
                    self._look(answer[1], answer[2] if everything else None)
                    return True

    async def _join(self) -> None:
        """Finds the group of these engines, and tells it the names that this one has told."""
        group = await self._script(keys=self._engines, args=["group", self._group or uuid4().hex])
        self._group = group.decode()
        for label, names in self._names.items():
            if told := [name for name, shown in names.items() if shown == name != OTHER]:
                await self._ask("admit", label, "", *told)
        self._joined = self._clock()

    async def _admit(self) -> None:
        for label, cap in self._caps.items():
            names = self._names[label]
            if new := [name for name in cap.names if name not in names]:
                flags = await self._ask("admit", label, cap.limit, *new)
                names.update((name, name if flag else OTHER) for name, flag in zip(new, flags, strict=True))

    def _admit_alone(self) -> None:
        """While nobody can be asked: up to the number that holds for all, by what is known here."""
        for label, cap in self._caps.items():
            names = self._names[label]
            many = sum(name == shown != OTHER for name, shown in names.items())
            for name in cap.names:
                if name not in names:
                    names[name] = name if many < cap.limit else OTHER
                    many += 1

    async def _counted(self) -> Snapshot:
        """By this process, and not told under an earlier id."""
        found = await Snapshot.of(self._own(), self._told)
        await found.subtract(self._base)
        return found

    async def _begin_anew(self, number: int) -> None:
        """Goes on under another id, from the publication that has been folded."""
        told = self._unsure if self._unsure is not None and self._unsure.number == number else self._known
        await self._base.add(told.snapshot, gauges=False)
        self._id = uuid4().hex
        self._known, self._unsure = _Publication(0, Snapshot(), b""), None

    def _look(self, numbers: Sequence[bytes], texts: Sequence[bytes] | None) -> None:
        """Takes over what Redis has."""
        now, seen = self._clock(), self._seen
        told = {name.decode(): int(number) for name, number in _pairs(numbers)}
        self._seen = {
            name: seen[name] if name in seen and seen[name].number == number else _Seen(number, now)
            for name, number in told.items()
        }
        if texts is not None:
            self._texts = {name.decode(): text for name, text in _pairs(texts)}

    def _lives(self, name: str) -> bool:
        one = self._seen.get(name)
        return one is not None and one.number > 0 and self._clock() - one.at <= FRESH_S

    def _old(self) -> list[str]:
        now = self._clock()
        return [
            name for name, one in self._seen.items() if name != self._id and (one.number < 0 or now - one.at > FOLD_S)
        ]

    async def _fold(self, name: str) -> bool:
        gone = self._texts.get(_GONE, b"")
        total = await Snapshot.decode(gone) if gone else Snapshot()
        await total.add(await Snapshot.decode(self._texts[name]), gauges=False)
        text = await total.encode()
        if await self._ask("fold", name, self._seen[name].number, gone, text):
            self._texts[_GONE] = text
            del self._texts[name], self._seen[name]
        return True

    async def _restore(self) -> None:
        """Gives an empty Redis what it had of the others when it was read last."""
        others = [
            (name, text, self._seen[name].number if name in self._seen else "")
            for name, text in self._texts.items()
            if name != self._id
        ]
        if others:
            await self._ask("restore", *(word for one in others for word in one))

    async def _add_up(self) -> None:
        tables, total = list(self._own()), Snapshot()
        if self._lost:
            self._admit_alone()
            total = await self._counted()
        living, read = 1, self._decoded
        self._decoded = {}
        for name, text in self._texts.items():
            decoded = self._decoded[name] = await Snapshot.decode(text, read.get(name))
            if name == self._id:
                if not self._lost:
                    await total.add(decoded)
                continue
            lives = self._lives(name)
            living += lives
            await total.add(decoded, gauges=lives)
        self.gateways = 1 if self._lost else living
        await self._sums.show(total, tables)

    async def _ask(self, operation: str, *words: str | int | bytes) -> Any:
        group = f"{_PREFIX}:{self._group}"
        return await self._script(keys=[group, f"{group}:numbers", f"{group}:"], args=[operation, *words])


def _pairs(flat: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)
