"""`serve --gateways 2`: two processes before one real engine; one is killed under streams, and last the engine."""

import asyncio
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from synthia_vllm.bench.gateway_loss import Read, billed, figures, read_all
from synthia_vllm.free_ports import free_port
from tests.running import Running, kill_all, new_key, until

pytestmark = pytest.mark.e2e

TOKENS = 40
PROMPTS = [f"Tell me a story about {about}." for about in ("an orca", "a robot", "the sea", "a fox", "tea", "rain")] * 2
FINISHED = re.compile(r'^synthia_requests_total\{user="alice".*outcome="finished"\} (\d+)$', re.MULTILINE)


@pytest.fixture
def several(tmp_path: Path, redis_url: str) -> Iterator[Running]:
    port = free_port()
    words = [sys.executable, "-m", "synthia_vllm", "serve", "--port", str(port), "--gateways", "2", "--log-file", "-"]
    words += ["--limits.redis", redis_url, "--timeouts.redis", "30", "--access.mode", "keys", "--log.format", "json"]
    words += ["--engine.dtype", "float32", "--engine.max-model-len", "2048"]
    environment = {"SYNTHIA_DATA": str(tmp_path / "data")}
    running = Running(words, port, "/ready", environment, tmp_path / "serve.log", start_timeout=240)
    try:
        running.start()
        until(lambda: "2 processes. Ready" in running.log.read_text(), "both are ready", 120)
        yield running
    finally:
        if running.process is not None:
            kill_all([psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children()])


def gateways(running: Running) -> list[psutil.Process]:
    """The processes that hold connections; the engine's does not listen."""
    assert running.process is not None
    found = []
    for one in psutil.Process(running.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if any(at.laddr.port == running.port for at in one.net_connections("tcp")):
                found.append(one)
    return found


def page(running: Running, key: str) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{running.url}/metrics", headers=headers, trust_env=False, timeout=10).text


def test_two_processes_serve_one_engine_and_the_death_of_one_is_not_seen(several: Running, tmp_path: Path) -> None:
    key, operator, data = new_key(tmp_path, "alice"), new_key(tmp_path, "olga", "--admin"), tmp_path / "data"
    assert several.process is not None
    children = psutil.Process(several.process.pid).children(recursive=True)
    one, other = gateways(several)

    async def kill(replies: Sequence[Read]) -> None:
        async with asyncio.timeout(120):
            while not all(len(one.at) > 2 for one in replies if one.streamed):
                await asyncio.sleep(0.02)
        assert one.net_connections("tcp")
        one.kill()

    undisturbed = asyncio.run(read_all([several.url], PROMPTS, TOKENS, key=key))
    texts = [one.text for one in undisturbed]
    assert not any(one.error for one in undisturbed)
    assert texts[: len(PROMPTS) // 2] == texts[len(PROMPTS) // 2 :]
    until(lambda: billed(data)[1] == len(PROMPTS) * TOKENS, "the undisturbed ones are billed")
    prompt = billed(data)[0]
    # One page tells of both processes, and of the engine once.
    until(lambda: FINISHED.findall(page(several, operator)) == [str(len(PROMPTS))], "one page tells of both")
    found = page(several, operator)
    assert "synthia_gateways 2" in found
    (generated,) = re.findall(r"^vllm:generation_tokens_total\{.*\} ([\d.]+)$", found, re.MULTILINE)
    assert float(generated) >= len(PROMPTS) * TOKENS
    (blocks,) = re.findall(r"^synthia_max_num_seqs\{.*\} ([\d.]+)$", found, re.MULTILINE)
    assert float(blocks) > 0

    disturbed = asyncio.run(read_all([several.url], PROMPTS, TOKENS, key=key, whole_every=3, meanwhile=kill))
    told = figures(texts, disturbed, TOKENS, [])
    assert (told["failed"], told["other texts"], told["other token counts"]) == (0, 0, 0), told
    until(lambda: billed(data) == (2 * prompt, 2 * len(PROMPTS) * TOKENS), f"all is billed once: {told}", 20)
    # Another one takes its place, which serves the same engine.
    until(lambda: len(gateways(several)) == 2 and one not in gateways(several), "it is replaced", 120)
    again = asyncio.run(read_all([several.url], PROMPTS, TOKENS, key=key))
    assert [one.text for one in again] == texts
    assert other.is_running()

    # Without the engine nothing can be served: all end, and whoever runs this starts it anew.
    (engine,) = [one for one in children if one.is_running() and "EngineCore" in " ".join(one.cmdline())]
    engine.kill()
    assert several.process.wait(60) == 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    several.process = None


def test_sigterm_lets_what_runs_finish_in_all_of_them(several: Running, tmp_path: Path) -> None:
    key = new_key(tmp_path, "alice")
    assert several.process is not None
    children = psutil.Process(several.process.pid).children(recursive=True)

    async def end(replies: Sequence[Read]) -> None:
        async with asyncio.timeout(120):
            while not all(len(one.at) > 2 for one in replies):
                await asyncio.sleep(0.02)
        assert several.process is not None
        several.process.terminate()

    found = asyncio.run(read_all([several.url], PROMPTS, TOKENS, key=key, meanwhile=end))
    assert [one.tokens for one in found] == [TOKENS] * len(PROMPTS), [one.error for one in found]
    assert several.process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    several.process = None
