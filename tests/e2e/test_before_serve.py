"""A gateway before `serve`: what its clients leave is told, to the token that the engine counted."""

import asyncio
import random
import re

import httpx
import pytest

from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.replicas.pool import ReplicaPool
from synthia_vllm.settings import ReplicasSettings
from tests.conftest import RunningServer
from tests.e2e.test_users import NewKey, new_key  # noqa: F401 (a fixture)
from tests.replicas.engines import until
from tests.replicas.test_left import Left

pytestmark = pytest.mark.e2e


async def generated(http: httpx.AsyncClient) -> float:
    """What vLLM has counted, when nothing runs."""
    while True:
        page = (await http.get("/metrics")).text
        if not re.search(r"^vllm:num_requests_running\{[^\n]* [1-9]", page, re.MULTILINE):
            return sum(map(float, re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", page, re.MULTILINE)))
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "text"])
async def test_what_was_generated_for_who_left_is_told(server: RunningServer, new_key: NewKey, ids: bool) -> None:  # noqa: F811
    from vllm.tokenizers import get_tokenizer

    from synthia_vllm.engine.demo import demo_model

    tokenizer = Tokenizer.of(get_tokenizer(str(demo_model()))) if ids else None
    settings = ReplicasSettings(canary_period_s=3600, canary_deadline_s=3600)
    dice = random.Random(3)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        ReplicaPool(settings, tokenizer=tokenizer, key=new_key(f"front-{ids}")) as pool,
    ):
        pool.update({"serve": server.url})
        await until(lambda: len(pool.up()) == 1)
        before, left = await generated(http), Left(pool, tokenizer)
        await asyncio.gather(
            *(left.after(number, dice.randint(1, 9), max_tokens=1000, ignore_eos=True) for number in range(12)),
            *(left.at(number, dice.uniform(0.2, 2), max_tokens=1000, ignore_eos=True) for number in range(12, 24)),
            *(left.after(number, 10**9, max_tokens=10) for number in range(24, 28)),
        )
        assert left.told == await generated(http) - before
