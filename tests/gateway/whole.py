"""A whole gateway around the null engine, with keys and a database, asked over ASGI."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.limits.base import Standing
from synthia_vllm.gateway.store.tables import Entry
from synthia_vllm.settings import Settings
from tests.gateway.asgi import Answer, ask, post

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
# Routes with a body, and a good one that asks for little.
BODIES: Mapping[str, dict[str, Any]] = {
    CHAT: {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
    COMPLETIONS: {"model": "synthia", "prompt": "Hello", "max_tokens": 5},
    RESPONSES: {"model": "synthia", "input": "Hello", "max_output_tokens": 5},
    MESSAGES: {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
    "/v1/messages/count_tokens": {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}]},
    "/tokenize": {"model": "synthia", "prompt": "Hello"},
    "/detokenize": {"model": "synthia", "tokens": [72, 105]},
}
GENERATING = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
LENGTH = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


@dataclass
class House:
    """The gateway, its engine, and its users by name."""

    gateway: Gateway
    engine: NullEnginePort
    keys: dict[str, str] = field(default_factory=dict)

    def let_in(self, user: str, *, models: list[str] | None = None, **limits: int) -> None:
        """Makes a key."""
        self.keys[user] = self.gateway.keys.create(user, limits=UserLimits(**limits), models=models)[1]

    async def post(self, user: str, path: str, body: dict[str, Any] | bytes | None = None, **options: Any) -> Answer:
        headers = {"x-api-key": self.keys.get(user, "none"), **options.pop("headers", {})}
        asked = BODIES[path] if body is None else body
        return await post(self.gateway.app, asked, path=path, headers=headers, **options)

    async def get(self, user: str, path: str, **headers: str) -> Answer:
        return await ask(self.gateway.app, "GET", path, headers={"x-api-key": self.keys.get(user, "none"), **headers})

    def bill(self, user: str) -> list[Entry]:
        """The user's rows, in the order of their arrival."""
        self.gateway.ledger.flush()
        with Session(self.gateway.keys.engine, expire_on_commit=False) as session:
            return list(session.scalars(select(Entry).where(Entry.user == user).order_by(Entry.arrived_at)))

    def billed(self, user: str) -> tuple[int, int]:
        """Tokens of prompts, and generated."""
        self.gateway.ledger.flush()
        sums = func.coalesce(func.sum(Entry.prompt_tokens), 0), func.coalesce(func.sum(Entry.generated_tokens), 0)
        with Session(self.gateway.keys.engine) as session:
            prompt, generated = session.execute(select(*sums).where(Entry.user == user)).one()
        return prompt, generated

    async def standing(self, user: str) -> Standing:
        return await self.gateway.limiter.standing(user)

    def at_rest(self) -> bool:
        """Whether nothing is under way any more, and no room is taken."""
        scheduler = self.gateway.scheduler
        return not (
            self.gateway.access.open
            or scheduler.queued_requests
            or scheduler.queued_tokens
            or scheduler.room.requests
            or scheduler.room.tokens
            or scheduler.running
            or self.engine.running
            or self.engine.waiting
        )

    async def rest(self) -> None:
        async with asyncio.timeout(10):
            while not self.at_rest():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def house(
    folder: Path, engine: NullEnginePort | None = None, *, capacity: Capacity | None = None, **settings: Any
) -> AsyncIterator[House]:
    """With the users alice, who has no limits, and bob, whose limits are out of reach."""
    engine = engine or NullEnginePort()
    async with Gateway(engine, house_settings(folder, **settings), capacity=capacity) as gateway:
        found = House(gateway, engine)
        found.let_in("alice")
        found.let_in("bob", tokens_per_minute=10**9, requests_per_minute=10**6, tokens_per_month=10**9)
        yield found


def house_settings(folder: Path, **settings: Any) -> Settings:
    access = {"mode": "keys", "database": f"sqlite:///{folder}/keys.db", "secret": "x" * 32}
    # On a machine whose disk has other things to do, SQLite may take its time.
    timeouts = {"database": 60.0, "redis": 60.0, **settings.pop("timeouts", {})}
    return Settings.model_validate({"access": access, "log": {"requests": False}, "timeouts": timeouts, **settings})
