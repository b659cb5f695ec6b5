"""POST /inference/v1/abort: a request of one's own is ended, and what it came to is told."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.api.abort import PATH
from synthia_vllm.bench.null.port import NullEnginePort
from tests.gateway.asgi import Answer
from tests.gateway.whole import BODIES, CHAT, COMPLETIONS, GENERATING, LENGTH, House, house


@asynccontextmanager
async def slow_house(folder: Path) -> AsyncIterator[House]:
    async with house(folder, NullEnginePort(tokens_per_second=200)) as found:
        yield found


async def ask(home: House, path: str, *, stream: bool, **more: Any) -> Answer:
    body = {**BODIES[path], LENGTH[path]: 2000, "stream": stream, **more}
    return await home.post("alice", path, body, headers={"x-request-id": "mine"})


async def abort(home: House, name: Any = "mine", user: str = "alice") -> tuple[int, dict[str, Any]]:
    answer = await home.post(user, PATH, json.dumps({"request_id": name}).encode())
    return answer.status, answer.json()


async def under_way(home: House) -> None:
    while not any(one.usage.generated for one in home.gateway.access.open.values()):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "more"),
    [*((path, {}) for path in GENERATING), (CHAT, {"n": 3}), (COMPLETIONS, {"prompt": ["a", "b"], "n": 2})],
)
async def test_it_is_ended_and_billed_for_what_is_told(
    tmp_path: Path, path: str, more: dict[str, Any], stream: bool
) -> None:
    async with slow_house(tmp_path) as home:
        asked = asyncio.create_task(ask(home, path, stream=stream, **more))
        await under_way(home)
        status, told = await abort(home)
        answer = await asyncio.wait_for(asked, 5)
        await home.rest()
        (row,) = home.bill("alice")
        assert (status, told) == (200, {"completion_tokens": row.generated_tokens})
        assert 0 < row.generated_tokens < 2000
        assert row.outcome == "cancelled"
        assert answer.status == (200 if stream else 409)


async def test_of_one_that_was_left_it_tells_the_same(tmp_path: Path) -> None:
    async with slow_house(tmp_path) as home:
        leave = asyncio.Event()
        path = GENERATING[0]
        body = {**BODIES[path], LENGTH[path]: 2000, "stream": True}
        asked = asyncio.create_task(home.post("alice", path, body, headers={"x-request-id": "mine"}, leave=leave))
        await under_way(home)
        leave.set()
        await asked
        await home.rest()
        (row,) = home.bill("alice")
        assert await abort(home) == (200, {"completion_tokens": row.generated_tokens})


async def test_nobody_elses_request_is_ended(tmp_path: Path) -> None:
    async with slow_house(tmp_path) as home:
        asked = asyncio.create_task(ask(home, GENERATING[0], stream=True))
        await under_way(home)
        status, told = await abort(home, user="bob")
        assert (status, told["error"]["code"]) == (404, "request_not_found")
        assert not asked.done()
        assert (await abort(home))[0] == 200
        await asked


async def test_what_is_over_was_refused_or_never_was_is_404(tmp_path: Path) -> None:
    async with slow_house(tmp_path) as home:
        path = GENERATING[0]
        for body in ({**BODIES[path], LENGTH[path]: 2}, {**BODIES[path], LENGTH[path]: "x"}):
            await home.post("alice", path, body, headers={"x-request-id": "mine"})
        for name in ("mine", "never"):
            assert (await abort(home, name))[0] == 404


@pytest.mark.parametrize("name", ["", 5, None, "x" * 300, ["a"]])
async def test_a_name_that_is_none_is_refused(tmp_path: Path, name: Any) -> None:
    async with slow_house(tmp_path) as home:
        status, told = await abort(home, name)
        assert (status, told["error"]["param"]) == (400, "request_id")
