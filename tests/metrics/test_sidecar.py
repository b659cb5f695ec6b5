"""The exporter beside engines of others."""

import asyncio

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.metrics.sidecar import Sidecar
from tests.gateway.asgi import post
from tests.gateway.live import serving
from tests.prometheus_service import promtool


async def test_the_engines_series_and_their_tokens_a_second() -> None:
    engine = NullEngine()
    body = {"model": "null", "prompt": "x", "max_tokens": 30, "stream": True}
    with serving(engine) as port, serving(NullEngine()) as other:
        await post(engine, body)
        async with Sidecar([f"http://127.0.0.1:{port}/", f"http://user:secret@127.0.0.1:{other}"]) as sidecar:
            first = (await sidecar.page()).decode()
            await post(engine, body)
            await asyncio.sleep(0.1)
            second = (await sidecar.page()).decode()
    name = f"127.0.0.1:{port}"
    rate = f'synthia_tokens_per_second{{model="null",replica="{name}",kind="generation"}}'
    assert f"{rate} 0.0" in first  # what was generated before makes no rate
    assert rate in second
    assert f"{rate} 0.0" not in second
    assert f'vllm:generation_tokens_total{{replica="{name}",engine="0",model_name="null"}} 60.0' in second
    assert f'synthia_replica_up{{replica="127.0.0.1:{other}"}} 1' in second
    assert 'synthia_replicas{state="up"} 2' in second
    assert "secret" not in second
    ours = "".join(line + "\n" for line in second.splitlines() if "vllm:" not in line)
    assert promtool("check", "metrics", stdin=ours).returncode == 0


async def test_an_engine_that_is_not_there_is_out() -> None:
    with serving(NullEngine()) as port:
        pass
    async with Sidecar([f"http://127.0.0.1:{port}"]) as sidecar:
        text = (await sidecar.page()).decode()
        assert sidecar.targets()[0]["targets"] == [f"127.0.0.1:{port}"]
    assert 'synthia_replicas{state="out"} 1' in text
    assert f'synthia_replica_up{{replica="127.0.0.1:{port}"}} 0' in text
