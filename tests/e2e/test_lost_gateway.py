"""Gateways before the real engine, killed under replies of all four APIs that go on at another one."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from synthia_vllm.bench.gateway_loss import Read, billed, figures, read_all
from tests.conftest import RunningServer
from tests.running import Running, gateway, new_key, until

pytestmark = pytest.mark.e2e

TOKENS = 40
PROMPTS = [f"Tell me a story about {about}." for about in ("an orca", "a robot", "the sea", "a fox", "tea", "rain")]


@pytest.fixture
def gateways(tmp_path: Path, server: RunningServer, redis_url: str) -> Iterator[list[Running]]:
    from synthia_vllm.engine.demo import demo_model

    options = ["--tokenizer", str(demo_model()), "--upstream", server.url, "--limits.redis", redis_url]
    options += ["--access.mode", "keys", "--timeouts.redis", "30"]
    found = [gateway(tmp_path, [], *options) for _ in range(2)]
    for one in found:
        at = [number for number, word in enumerate(one.words) if word == "--tokenizer"][-1]
        del one.words[at : at + 2]  # the null engines'
        one.start()
    try:
        yield found
    finally:
        for one in found:
            one.stop()


def test_whoever_comes_back_has_the_same_reply_and_pays_once(gateways: list[Running], tmp_path: Path) -> None:
    key, data = new_key(tmp_path, "alice"), tmp_path / "data"
    urls = [one.url for one in gateways]
    for url in urls:
        until(
            lambda url=url: httpx.get(f"{url}/v1/models", headers={"x-api-key": key}).is_success, "the engine is known"
        )

    async def kill(replies: Sequence[Read]) -> None:
        async with asyncio.timeout(120):
            while not all(len(one.at) > 2 for one in replies if one.streamed):
                await asyncio.sleep(0.02)
        await asyncio.to_thread(gateways[0].kill)

    undisturbed = asyncio.run(read_all(urls, PROMPTS, TOKENS, key=key))
    texts = [one.text for one in undisturbed]
    until(lambda: billed(data)[1] == len(PROMPTS) * TOKENS, "the undisturbed ones are billed")
    prompt = billed(data)[0]
    found = asyncio.run(read_all(urls, PROMPTS, TOKENS, key=key, whole_every=3, meanwhile=kill))
    told = figures(texts, found, TOKENS, [])
    assert (told["failed"], told["other texts"], told["other token counts"]) == (0, 0, 0), [one.error for one in found]
    until(
        lambda: billed(data) == (2 * prompt, 2 * len(PROMPTS) * TOKENS), f"all is billed once: {json.dumps(told)}", 20
    )
