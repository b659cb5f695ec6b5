"""A server that ends in the midst of its streams, on real sockets: what was delivered is billed."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.server import _watch_engine
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.listener import DrainingServer, bind
from synthia_vllm.gateway.store import ledger as ledger_module
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.tables import Entry
from synthia_vllm.gateway.store.usage import gaps
from synthia_vllm.settings import Settings
from tests.gateway.store.conftest import MakeExchange

STREAMS = 8
_BODY = {"model": "null", "prompt": "What is an orca?", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@dataclass
class Serving:
    server: DrainingServer
    url: str
    delivered: int = 0  # chunks that clients have
    begun: int = 0  # streams

    async def read(self) -> None:
        """One stream, to its end of whatever kind."""
        first = True
        async with httpx.AsyncClient(timeout=30) as client:
            try:
                async with client.stream("POST", f"{self.url}/v1/completions", json=_BODY) as reply:
                    async for line in reply.aiter_lines():
                        if line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("text"):
                            self.delivered += 1
                            self.begun += first
                            first = False
            except httpx.TransportError:
                return


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Serving]:
    settings = Settings(
        port=0,
        access={"database": f"sqlite:///{folder}/synthia.db"},
        log={"requests": False},  # type: ignore[arg-type]
    )
    sock = bind(settings)
    listening = asyncio.Event()
    async with Gateway(NullEnginePort(tokens_per_second=100), settings) as gateway:
        server = DrainingServer(gateway.app, settings, listening.set)
        running = asyncio.create_task(server.serve(sockets=[sock]))
        await listening.wait()
        yield Serving(server, f"http://127.0.0.1:{sock.getsockname()[1]}")
        await running


class Dying:
    """Stands in for vLLM's AsyncLLM: all that is asked of it is whether it has died."""

    errored = False


async def second_signal(server: DrainingServer) -> None:
    server.stop()
    await asyncio.sleep(0.2)
    server.stop()


async def engine_death(server: DrainingServer) -> None:
    engine = Dying()
    watch = asyncio.create_task(_watch_engine(engine, server))
    await asyncio.sleep(0.2)
    engine.errored = True
    await watch


@pytest.mark.parametrize("end", [second_signal, engine_death])
async def test_what_was_delivered_is_billed_and_nothing_is_missing(
    tmp_path: Path, end: Callable[[DrainingServer], Awaitable[None]]
) -> None:
    async with asyncio.timeout(30), serving(tmp_path) as found:
        readers = [asyncio.create_task(found.read()) for _ in range(STREAMS)]
        while found.begun < STREAMS:
            await asyncio.sleep(0.02)
        await end(found.server)
    await asyncio.gather(*readers)
    database = open_database(f"sqlite:///{tmp_path}/synthia.db")
    with Session(database) as session:
        rows = session.scalars(select(Entry)).all()
        assert [row.outcome for row in rows] == ["stopped"] * STREAMS
        assert sum(row.generated_tokens for row in rows) >= found.delivered >= STREAMS
    with capture_logs() as logs:
        Ledger(database).close()
    assert logs == []
    assert gaps(database) == []
    database.dispose()


def test_what_never_ends_is_billed_as_far_as_it_came(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    exchange = make_exchange("a", prompt=10, generated=5, outcome="stopped")
    ledger.opened(exchange)
    ledger.close()
    with Session(engine) as session:
        (row,) = session.scalars(select(Entry)).all()
    assert (row.outcome, row.prompt_tokens, row.generated_tokens) == ("stopped", 10, 5)


def test_a_gap_tells_what_was_under_way(engine: Engine, make_exchange: MakeExchange) -> None:
    """Which ends with no word: nothing closes the first ledger."""
    ledger = Ledger(engine)
    for name, generated in (("a", 5), ("b", 7), ("c", 0)):
        exchange = make_exchange(name, prompt=10, generated=generated)
        exchange.usage.accepted = generated > 0
        ledger.opened(exchange)
    ended = make_exchange("d")
    ledger.opened(ended)
    ledger.ended(ended)
    assert ledger.flush()
    with pytest.MonkeyPatch.context() as patch, capture_logs() as logs:
        patch.setattr(ledger_module, "_alive", lambda writer: False)
        Ledger(engine).close()
    assert [(line["requests"], line["tokens"], line["tokens_most"]) for line in logs] == [(3, 32, 330)]
    (gap,) = gaps(engine)
    assert (gap.requests, gap.tokens, gap.tokens_most) == (3, 32, 330)
