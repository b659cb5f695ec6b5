"""What the gateways have to do, told to whoever scales the engine.

Each gateway writes its own load to a board that Ray keeps in its GCS. There it outlives every process of ours and of
Serve, needs none to be kept alive (an actor would), and a controller that starts anew reads it at once. The clocks of
machines differ, so a value has no time in it but a beat, which goes on as long as its gateway lives.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import structlog

FRESH_S = 10.0
BOARD = "synthia-vllm-load"
_PERIOD_S = 1.0
_FORGOTTEN_S = 600.0
_log = structlog.get_logger(__name__)


class Load(msgspec.Struct, frozen=True):
    """One gateway's load, or that of all."""

    tokens: int = 0  # of KV cache that its running requests count with
    queued_tokens: int = 0  # of requests in its fair queue, prompt and the most they may generate
    requests: int = 0  # running, queued, or waiting for a replica
    tokens_per_replica: int | None = None  # what one replica's KV cache holds; None as long as none has told
    beat: int = 0  # another one each time that it is written


def total(loads: Iterable[Load]) -> Load | None:
    """The load of all these gateways; None where there is none, which is not the same as no load."""
    found = list(loads)
    if not found:
        return None
    sizes = [load.tokens_per_replica for load in found if load.tokens_per_replica]
    return Load(
        tokens=sum(load.tokens for load in found),
        queued_tokens=sum(load.queued_tokens for load in found),
        requests=sum(load.requests for load in found),
        tokens_per_replica=min(sizes) if sizes else None,
    )


@dataclass(slots=True)
class _Seen:
    load: Load
    at: float  # by the reader's clock, when it was first like this
    lives: bool  # it changed under the reader's eyes


class LoadReader:
    """Adds up what the gateways that live tell, by the reader's own clock alone.

    A gateway is dead once its value has stayed the same for `FRESH_S`. Of one that was there when reading began, or
    began again after a while, nobody can tell before it changes or that time is over: the total is None until then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._read_at = float("-inf")

    def total(self, loads: Mapping[str, Load]) -> Load | None:
        """`loads` is all that the board says now, by gateway."""
        now = self._clock()
        begins = now - self._read_at > FRESH_S
        self._read_at = now
        before = {} if begins else self._seen
        self._seen = {}
        for name, load in loads.items():
            seen = before.get(name)
            same = seen is not None and seen.load.beat == load.beat
            self._seen[name] = seen if seen and same else _Seen(load, now, lives=not begins)
        fresh = [seen for seen in self._seen.values() if now - seen.at <= FRESH_S]
        return total(seen.load for seen in fresh) if all(seen.lives for seen in fresh) else None

    def long_dead(self) -> list[str]:
        """Gateways that will never take their value off the board."""
        now = self._clock()
        return [name for name, seen in self._seen.items() if now - seen.at > _FORGOTTEN_S]

    def read(self) -> Load | None:
        """The total of what the board says now; blocks on the network."""
        from synthia_vllm.cluster.private_ray import Board

        board = Board(BOARD)
        found = self.total({name: msgspec.json.decode(value, type=Load) for name, value in board.read().items()})
        for name in self.long_dead():
            board.remove(name)
        return found


async def tell(name: str, measure: Callable[[], Load]) -> None:
    """Writes one gateway's load once a second until cancelled, and then takes it off."""
    from synthia_vllm.cluster.private_ray import Board

    board = Board(BOARD)
    try:
        for beat in itertools.count(1):
            try:
                load = msgspec.structs.replace(measure(), beat=beat)
                await asyncio.to_thread(board.put, name, msgspec.json.encode(load))
            except Exception as error:  # the GCS is away; the gateway serves without it
                _log.warning("load_not_told", error=type(error).__name__)
            await asyncio.sleep(_PERIOD_S)
    finally:
        await asyncio.to_thread(board.remove, name)
