"""Layers around an engine, with users and without stores, asked over ASGI."""

from collections.abc import Callable, Sequence
from typing import Any

import httpx

from synthia_vllm.engine.port import Engine
from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.apis import Apis
from synthia_vllm.gateway.app import METHODS
from synthia_vllm.gateway.edge.routes import Routes
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.request import Exchange, Layer, Observer
from synthia_vllm.gateway.sequences import Sequences
from synthia_vllm.settings import PromptSettings

ACCOUNTS = {
    "sk-alice": Account("alice"),
    "sk-small": Account("small", models=frozenset({"synthia"})),
    "sk-root": Account("root", admin=True),
}


class Noting(Observer):
    """An observer that keeps the exchanges, in the order of their ends."""

    def __init__(self) -> None:
        self.ended_ones: list[Exchange] = []

    def ended(self, exchange: Exchange) -> None:
        self.ended_ones.append(exchange)


class Stack:
    """Routes, Access, the APIs, whatever is `between`, Sequences, Meter, and an engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        between: Callable[[Layer], Layer] = lambda layer: layer,
        observers: Sequence[Observer] = (),
        keys_required: bool = True,
        prompt: PromptSettings | None = None,
        **options: Any,
    ) -> None:
        noting = Noting()
        self.exchanges = noting.ended_ones
        apis = Apis(engine, between(Sequences(Meter(engine))), prompt or PromptSettings(), observers=observers)
        self.access = Access(
            apis, lookup=_lookup, keys_required=keys_required, observers=[*observers, noting], **options
        )
        self.app = Routes(self.access, methods=METHODS)

    def client(self, key: str | None = "sk-alice") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


async def _lookup(key: str) -> Account | None:
    return ACCOUNTS.get(key)
