"""The null engine's faults, over real sockets where the connection is what breaks."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.tokens import prompt_ids
from synthia_vllm.bench.streams import wait_for
from synthia_vllm.free_ports import free_port
from tests.gateway.live import serving

BODY: dict[str, Any] = {"model": "m", "prompt": "What is an orca?", "max_tokens": 5, "return_token_ids": True}


def test_a_stream_breaks_off_where_it_was_told_to() -> None:
    with (
        serving(NullEngine(faults=Faults(break_after=3))) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
        client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply,
    ):
        got: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError):
            got.extend(reply.iter_lines())
        assert sum(line.startswith("data: {") for line in got) <= 2


async def ask(engine: NullEngine, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=engine)
    async with httpx.AsyncClient(transport=transport, base_url="http://null") as client:
        return await client.post(path, json=body)


async def test_a_dead_engine_says_so_as_vllm_does() -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    engine = NullEngine(tokens_per_second=100)
    running = asyncio.create_task(ask(engine, **BODY | {"stream": True, "max_tokens": 10_000}))
    while not engine.running:
        await asyncio.sleep(0.01)
    assert (await ask(engine, "/fault", dead=True)).json()["running"] == 1
    events = (await running).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert ErrorResponse.model_validate_json(events[-2].removeprefix("data: ")).error.code == 500
    assert (await ask(engine, **BODY)).status_code == 500
    await ask(engine, "/fault", dead=False)
    assert (await ask(engine, **BODY)).status_code == 200


async def test_a_hung_engine_sends_nothing_until_it_is_let_go() -> None:
    engine = NullEngine(faults=Faults(hang=True))
    running = [asyncio.create_task(ask(engine, **BODY | {"stream": stream})) for stream in (True, False)]
    done, _ = await asyncio.wait(running, timeout=0.2)
    assert not done
    await ask(engine, "/fault", hang=False)
    assert [reply.status_code for reply in await asyncio.gather(*running)] == [200, 200]


async def test_errors_lies_and_unknown_faults() -> None:
    engine = NullEngine(faults=Faults(status=503))
    assert (await ask(engine, **BODY)).status_code == 503
    await ask(engine, "/fault", status=None, usage_lie=2)
    assert (await ask(engine, **BODY)).json()["usage"]["completion_tokens"] == 7
    wrong = await ask(engine, "/fault", fire=True)
    assert wrong.status_code == 400
    assert "fire" in wrong.text


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    words = ["-m", "synthia_vllm.bench.null.engine", "--port", str(port), "--poison", "arsenic"]
    running = subprocess.Popen([sys.executable, *words])
    try:
        wait_for(port)
        yield running, f"http://127.0.0.1:{port}"
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("prompt", ["a pinch of arsenic", prompt_ids("arsenic, a pinch")])
def test_poison_kills_as_text_and_as_ids(process: tuple[subprocess.Popen[bytes], str], prompt: Any) -> None:
    running, url = process
    assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": prompt})
    assert running.wait(10) == 1


def test_connections_are_refused_for_a_while(process: tuple[subprocess.Popen[bytes], str]) -> None:
    _, url = process
    assert httpx.post(f"{url}/fault", json={"refuse_s": 1.0}).status_code == 200
    refused = 0
    for _ in range(200):
        try:
            reply = httpx.post(f"{url}/v1/completions", json=BODY)
        except httpx.ConnectError:
            refused += 1
            time.sleep(0.05)
        else:
            if refused:
                break
    assert refused
    assert reply.json()["usage"]["completion_tokens"] == 5
