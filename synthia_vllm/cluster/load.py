"""What the gateways have to do, told to whoever scales the engine.

Each gateway writes its own load to a board that Ray keeps in its GCS. There it outlives every process of ours and of
Serve, needs none to be kept alive (an actor would), and a controller that starts anew reads it at once. A gateway that
died stops writing; what is older than `FRESH_S` does not count.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

import msgspec
import structlog

FRESH_S = 10.0
BOARD = "synthia-vllm-load"
_PERIOD_S = 1.0
_log = structlog.get_logger(__name__)


class Load(msgspec.Struct, frozen=True):
    """One gateway's load, or that of all."""

    tokens: int = 0  # of KV cache that its running requests count with
    queued_tokens: int = 0  # of requests in its fair queue, prompt and the most they may generate
    requests: int = 0  # running, queued, or waiting for a replica
    tokens_per_replica: int | None = None  # what one replica's KV cache holds; None as long as none has told
    at: float = 0.0  # Unix time


def total(loads: Iterable[Load], now: float) -> Load | None:
    """The load of all gateways that live; None where none does, which is not the same as no load."""
    fresh = [load for load in loads if now - load.at <= FRESH_S]
    if not fresh:
        return None
    sizes = [load.tokens_per_replica for load in fresh if load.tokens_per_replica]
    return Load(
        tokens=sum(load.tokens for load in fresh),
        queued_tokens=sum(load.queued_tokens for load in fresh),
        requests=sum(load.requests for load in fresh),
        tokens_per_replica=min(sizes) if sizes else None,
        at=max(load.at for load in fresh),
    )


def read_total() -> Load | None:
    """From the board; blocks on the network."""
    from synthia_vllm.cluster.serve_internals import Board

    loads = [msgspec.json.decode(value, type=Load) for value in Board(BOARD).read().values()]
    return total(loads, time.time())


async def tell(name: str, measure: Callable[[], Load]) -> None:
    """Writes one gateway's load once a second until cancelled, and then takes it off."""
    from synthia_vllm.cluster.serve_internals import Board

    board = Board(BOARD)
    try:
        while True:
            try:
                load = msgspec.structs.replace(measure(), at=time.time())
                await asyncio.to_thread(board.put, name, msgspec.json.encode(load))
            except Exception as error:  # the GCS is away; the gateway serves without it
                _log.warning("load_not_told", error=type(error).__name__)
            await asyncio.sleep(_PERIOD_S)
    finally:
        await asyncio.to_thread(board.remove, name)
