"""A month's budget whose database is gone: refused or let pass as `--limits.on-loss` says; a real PostgreSQL."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.limits import billed
from synthia_vllm.settings import Settings
from tests.services import Postgres

BODY = json.dumps({"model": "synthia", "prompt": "Hello", "max_tokens": 5})


@pytest.fixture(params=["memory", "redis"])
def redis(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is back is asked again without a pause."""
    monkeypatch.setattr(billed, "_PAUSE_S", 0.0)


class Client:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.key = gateway.keys.create("bob", limits=UserLimits(tokens_per_month=1000))[1]

    async def ask(self) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.gateway.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            headers = {"x-api-key": self.key, "content-type": "application/json"}
            return await client.post("/v1/completions", content=BODY, headers=headers)

    async def known(self) -> None:
        """The key is looked up while the database is there; what the month has used is not."""
        keys = self.gateway.key_cache
        while keys._revision is None:
            await asyncio.sleep(0.05)
        assert await keys.lookup(self.key) is not None


@pytest.fixture
async def clients(postgres: Postgres, redis: str | None) -> AsyncIterator[Any]:
    opened = []

    async def make(on_loss: str) -> Client:
        given = {
            "access": {"mode": "keys", "database": postgres.new_database(), "secret": "x" * 32},
            "limits": {"on_loss": on_loss, "redis": redis},
            "log": {"requests": False},
        }
        gateway = Gateway(NullEnginePort(), Settings(**given))  # type: ignore[arg-type]
        opened.append(gateway)
        await gateway.__aenter__()
        client = Client(gateway)
        await client.known()
        return client

    yield make
    if postgres.process is None:
        await asyncio.to_thread(postgres.start)
    for gateway in opened:
        await gateway.__aexit__()


async def test_a_months_budget_that_can_not_be_looked_up_is_refused_where_losses_close(
    clients: Any, postgres: Postgres
) -> None:
    client = await clients("closed")
    await asyncio.to_thread(postgres.stop)
    reply = await client.ask()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
    assert "what this month has used can't be looked up" in reply.json()["error"]["message"]
    assert "retry-after" in reply.headers
    await asyncio.to_thread(postgres.start)
    assert (await client.ask()).status_code == 200


async def test_a_months_budget_that_can_not_be_looked_up_passes_where_losses_are_local(
    clients: Any, postgres: Postgres, redis: str | None
) -> None:
    client = await clients("local")
    await asyncio.to_thread(postgres.stop)
    replies = [await client.ask() for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert (await client.gateway.limiter.standing("bob")).tokens_this_month == 0
    await asyncio.to_thread(postgres.start)
    while client.gateway.ledger.waiting:
        await asyncio.sleep(0.1)
    before = sum(reply.json()["usage"]["total_tokens"] for reply in replies)
    last = (await client.ask()).json()["usage"]["total_tokens"]
    assert (await client.gateway.limiter.standing("bob")).tokens_this_month == before + last
