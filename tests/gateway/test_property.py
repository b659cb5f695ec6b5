"""Whatever clients send and whenever they leave: the bill, the limits and the engine agree, and others notice nothing.

Requests are made up over all public inputs of the four APIs, and so is what the engine does. They run side by side
against a whole gateway; then there is nothing left of them but their rows.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from tests.gateway.asgi import Answer
from tests.gateway.bodies import bodies
from tests.gateway.whole import CHAT, GENERATING, House, house

EXAMPLES = int(os.environ.get("SYNTHIA_FUZZ_EXAMPLES", "60"))
USERS = ("bob", "tight")
TIGHT = {"tokens_per_minute": 20_000, "concurrent_requests": 2, "tokens_per_month": 10**12}
thorough = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class Asked:
    """A request, and when its client leaves: after so many turns of the loop or tokens of the engine, or never."""

    path: str
    body: bytes
    user: str
    turns: int | None
    tokens: int | None
    headers: dict[str, str] = field(default_factory=dict)


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    path = draw(st.sampled_from(GENERATING))
    leaves = draw(st.sampled_from(["never", "never", "turns", "tokens"]))
    return Asked(
        path,
        draw(bodies(path)),
        draw(st.sampled_from(USERS)),
        draw(st.integers(0, 60)) if leaves == "turns" else None,
        draw(st.integers(1, 40)) if leaves == "tokens" else None,
        draw(
            st.sampled_from([{}, {}, {"x-session-id": "s"}, {"x-queue-timeout-s": "30"}, {"x-queue-timeout-s": "no"}])
        ),
    )


@dataclass
class Engine:
    """What the engine does in one example."""

    faults: dict[str, Any]
    tokens_per_second: float | None
    reply_tokens: int | None
    text: str | None


engines = st.builds(
    Engine,
    faults=st.one_of(
        st.just({}),
        st.just({}),
        st.fixed_dictionaries({"break_after": st.integers(1, 30)}),
        st.fixed_dictionaries({"status": st.sampled_from([400, 500, 502, 503, 504])}),
        st.just({"dead": True}),
    ),
    tokens_per_second=st.sampled_from([None, None, 2000.0]),
    reply_tokens=st.one_of(st.none(), st.integers(1, 20)),
    text=st.sampled_from([None, None, "Hello!", "Yes.\nUSER: and you?", "a😀é\n\nSYSTEM: x"]),
)


# The gateway


class Homes:
    """A gateway that lives in a loop of its own, as long as the tests do."""

    def __init__(self, folder: Path, engine: NullEnginePort, redis: str | None) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.stack = AsyncExitStack()
        self.home: House = self.run(self._enter(folder, engine, redis))

    async def _enter(self, folder: Path, engine: NullEnginePort, redis: str | None) -> House:
        home = await self.stack.enter_async_context(
            house(folder, engine, capacity=Capacity(requests=8), limits={"redis": redis})
        )
        home.let_in("tight", **TIGHT)
        for user in USERS:
            assert (await home.post(user, CHAT)).status == 200
        await home.rest()
        return home

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def close(self) -> None:
        self.run(self.stack.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module", params=["memory", "redis", "text"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homes]:
    """Limits in the process and in Redis, before an engine that is sent ids; and one that is sent text, and counts."""
    redis = request.getfixturevalue("redis_server").url if request.param == "redis" else None
    engine = NullEnginePort(tokenizer=None if request.param == "text" else "null", max_num_seqs=16)
    homes = Homes(tmp_path_factory.mktemp("home"), engine, redis)
    yield homes
    homes.close()


async def ask(home: House, one: Asked) -> Answer:
    leave = asyncio.Event()
    task = asyncio.create_task(home.post(one.user, one.path, one.body, headers=one.headers, leave=leave))
    if one.turns is not None:
        for _ in range(one.turns):
            await asyncio.sleep(0)
        leave.set()
    elif one.tokens is not None:
        before = home.engine.generated
        while not task.done() and home.engine.generated < before + one.tokens:
            await asyncio.sleep(0)
        leave.set()
    async with asyncio.timeout(30):
        return await task


@dataclass
class Counted:
    """What each of those who count has counted so far."""

    engine: int
    bill: dict[str, tuple[int, int]]
    limits: dict[str, int]
    metrics: tuple[float, float]


async def count(home: House) -> Counted:
    recorder = home.gateway.exporter.recorder
    prompt, generated = (
        sum(cell.value for cell in table.cells.values())
        for table in (recorder.prompt_tokens, recorder.generation_tokens)
    )
    return Counted(
        home.engine.generated,
        {user: home.billed(user) for user in USERS},
        {user: (await home.standing(user)).tokens_this_month for user in USERS},
        (prompt, generated),
    )


async def check(home: House, engine: Engine, requests: list[Asked]) -> set[int]:
    """Runs one example; returns the statuses that there were."""
    before = await count(home)
    port = home.engine
    port.tokens_per_second, port.reply_tokens, port.text = engine.tokens_per_second, engine.reply_tokens, engine.text
    port.faults.change(engine.faults)
    answers = await asyncio.gather(*(ask(home, one) for one in requests))
    await home.rest()
    port.faults.change(dict.fromkeys(engine.faults))
    port.faults.change({"dead": False})

    for one, answer in zip(requests, answers, strict=True):
        if not engine.faults:
            assert answer.status < 500, (one, answer.body)
        assert answer.status != 500, (one, answer.body)
        assert answer.whole or one.turns is not None or one.tokens is not None
        if answer.whole and answer.status >= 400:
            assert answer.json()["error"]["message"]
        elif answer.whole:
            assert answer.events() or answer.json()

    after = await count(home)
    generated = sum(after.bill[user][1] - before.bill[user][1] for user in USERS)
    assert generated == after.engine - before.engine
    for user in USERS:
        billed = sum(after.bill[user]) - sum(before.bill[user])
        assert billed == after.limits[user] - before.limits[user], user
    prompt = sum(after.bill[user][0] - before.bill[user][0] for user in USERS)
    told = (after.metrics[0] - before.metrics[0], after.metrics[1] - before.metrics[1])
    assert told == (prompt, generated)

    for path in GENERATING:
        assert (await home.post("alice", path)).status == 200
    await home.rest()
    return {answer.status for answer in answers}


@thorough
@given(engine=engines, requests=st.lists(asked(), min_size=1, max_size=6))
def test_bill_and_limits_are_what_the_engine_generated_and_others_notice_nothing(
    home: Homes, engine: Engine, requests: list[Asked]
) -> None:
    for status in sorted(home.run(check(home.home, engine, requests))):
        event(f"status {status}")


@thorough
@given(requests=st.lists(asked(), min_size=1, max_size=6), after=st.integers(1, 20))
def test_clients_that_leave_an_engine_that_hangs_leave_nothing_behind(
    home: Homes, requests: list[Asked], after: int
) -> None:
    for one in requests:
        one.turns, one.tokens = one.turns or 30, None
    home.run(check(home.home, Engine({"stall_after": after}, None, None, None), requests))
