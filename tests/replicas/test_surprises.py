"""What runs beside the replicas meets what nobody thought of, once, and goes on."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.metrics.exporter import Exporter
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.replicas.pool import ReplicaPool
from synthia_vllm.settings import MetricsSettings, SloSettings
from tests.replicas.engines import Live, pool_of, until


def restarts(task: str) -> float:
    return REGISTRY.get_sample_value("synthia_background_restarts_total", {"task": task}) or 0.0


def fail_once(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """The next call of a method fails, with what none of its callers expects."""
    method: Callable[..., Any] = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        patch.setattr(owner, name, method)
        raise KeyError("what nobody thought of")

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("task", "method"), [("pool", "_look_after"), ("question", "_counters"), ("canary", "_canary")]
)
async def test_health_is_judged_on_after_a_surprise(
    live: Live, monkeypatch: pytest.MonkeyPatch, task: str, method: str
) -> None:
    engines = [NullEngine(), NullEngine()]
    before = restarts(task)
    async with pool_of(*map(live, engines)) as pool:
        fail_once(monkeypatch, ReplicaPool, method)
        await until(lambda: restarts(task) > before)
        engines[0].faults.change({"dead": True})
        await until(lambda: {replica.name for replica in pool.up()} == {"r1"})
        engines[0].faults.change({"dead": False})
        await until(lambda: len(pool.up()) == 2)


async def test_engines_are_scraped_on_after_a_surprise(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    before = restarts("fleet")
    async with pool_of(live(NullEngine())) as pool:
        fleet = Fleet(pool)
        fail_once(monkeypatch, Fleet, "_read")
        await fleet.refresh(5.0)
        await until(lambda: restarts("fleet") == before + 1)
        await fleet.refresh(5.0)
        assert [engine.fresh for engine in fleet.engines.values()] == [True]
        await fleet.close()


async def test_an_exporter_keeps_its_window_after_a_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = restarts("exporter")
    recorder = Recorder(MetricsSettings(), SloSettings())
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 1:
            raise OverflowError

    monkeypatch.setattr(recorder.rates, "tick", tick)
    async with asyncio.timeout(20), Exporter(recorder, lambda: Waiting({}, {})):
        await until(lambda: ticks > 2)
    assert restarts("exporter") == before + 1
