"""Replicas that are scraped, die and are replaced; the last test by a real Prometheus."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.metrics import fleet as fleet_module
from synthia_vllm.metrics.exporter import Exporter, MetricsRoutes
from synthia_vllm.metrics.exposition import Exposition
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.replicas import ReplicaState, ReplicaView
from synthia_vllm.settings import MetricsSettings, SloSettings
from tests.gateway.live import serving
from tests.prometheus_service import running_prometheus

RUNNING = 'vllm:num_requests_running{replica="%s"'
TOKENS = "vllm:generation_tokens_total"


class Source:
    """Replicas that come and go as the test says."""

    def __init__(self) -> None:
        self.views: dict[str, ReplicaView] = {}

    def add(self, name: str, port: int, state: ReplicaState = "up") -> None:
        self.views[name] = ReplicaView(name, f"http://127.0.0.1:{port}", state, 0)

    def replicas(self) -> list[ReplicaView]:
        return list(self.views.values())


async def page(fleet: Fleet, wait: float = 5.0) -> str:
    await fleet.refresh(wait)
    exposition = Exposition(False)
    await fleet.add_to(exposition)
    return (await exposition.bytes()).decode()


async def test_a_dead_replicas_counters_stay_and_its_gauges_go() -> None:
    source = Source()
    fleet = Fleet(source)
    with serving(NullEngine()) as first, ExitStack() as second:
        source.add("a", first)
        source.add("b", second.enter_context(serving(NullEngine())))
        text = await page(fleet)
        assert 'synthia_replica_up{replica="a"} 1\nsynthia_replica_up{replica="b"} 1' in text
        assert RUNNING % "b" in text
        assert text.count(f"# TYPE {TOKENS} counter") == 1
        second.close()
        text = await page(fleet)
        assert 'synthia_replica_up{replica="b"} 0' in text
        assert RUNNING % "b" not in text
        assert f'{TOKENS}{{replica="b"' in text
        del source.views["b"]
        text = await page(fleet)
        assert 'synthia_replica_up{replica="b"} 0' in text
        assert f'{TOKENS}{{replica="b"' in text
        assert 'synthia_replicas{state="up"} 1' in text
    await fleet.close()


@pytest.mark.parametrize("state", ["unproven", "draining", "out"])
async def test_only_a_replica_that_takes_requests_is_up(state: ReplicaState) -> None:
    source = Source()
    fleet = Fleet(source)
    with serving(NullEngine()) as port:
        source.add("a", port, state)
        text = await page(fleet)
    assert 'synthia_replica_up{replica="a"} 0' in text
    assert f'synthia_replicas{{state="{state}"}} 1' in text
    await fleet.close()


async def test_who_can_generate_now_is_known_without_asking() -> None:
    source = Source()
    fleet = Fleet(source)
    with ExitStack() as running:
        source.add("a", running.enter_context(serving(NullEngine())))
        source.add("unasked", 9)
        source.add("starting", 9, "unproven")
        fleet.follow()
        assert [name for name, engine in fleet.engines.items() if engine.serves] == ["a", "unasked"]
        assert fleet.serving == 2
        await fleet.refresh(5.0)
        assert fleet.engines["a"].serves
        source.add("a", 9, "draining")
        fleet.follow()
        assert fleet.engines["a"].serves
        source.add("a", 9, "out")
        fleet.follow()
        assert not fleet.engines["a"].serves
        source.add("a", 9)
        await fleet.refresh(5.0)  # it told of itself before, and no longer does
        assert not fleet.engines["a"].serves
    await fleet.close()


async def test_a_replica_that_hangs_holds_up_neither_the_scrape_nor_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "ANSWER_S", 0.5)
    release = threading.Event()

    async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)

    source = Source()
    fleet = Fleet(source)
    with serving(NullEngine()) as good, serving(hanging) as bad:
        source.add("a", good)
        source.add("b", bad)
        text = await page(fleet, wait=0.2)
        assert 'synthia_replica_up{replica="a"} 1' in text
        assert 'synthia_replica_up{replica="b"} 0' in text
        assert RUNNING % "a" in text
        release.set()
    await fleet.close()


async def test_service_discovery_names_each_replicas_own_port() -> None:
    source = Source()
    source.views["a"] = ReplicaView("a", "http://10.0.0.1:30000/engine", "up", 0)
    source.views["b"] = ReplicaView("b", "https://user:secret@10.0.0.2:30001", "up", 0)
    assert Fleet(source).targets() == [
        {
            "targets": ["10.0.0.1:30000"],
            "labels": {"replica": "a", "__metrics_path__": "/engine/metrics", "__scheme__": "http"},
        },
        {
            "targets": ["10.0.0.2:30001"],
            "labels": {"replica": "b", "__metrics_path__": "/metrics", "__scheme__": "https"},
        },
    ]


class Streams(threading.Thread):
    """Keeps so many streams going on one engine, until told to stop."""

    def __init__(self, port: int, count: int) -> None:
        super().__init__()
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._count = count
        self.stop = threading.Event()

    def run(self) -> None:
        threads = [threading.Thread(target=self._stream) for _ in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _stream(self) -> None:
        body = {"model": "null", "prompt": "x", "max_tokens": 100_000, "stream": True}
        try:
            with httpx.stream("POST", self._url, json=body, timeout=10, trust_env=False) as reply:
                for _ in reply.iter_raw():
                    if self.stop.is_set():
                        return
        except httpx.HTTPError:
            return  # its engine was killed


def test_rates_over_a_sum_show_no_spike_and_no_negative_when_a_replica_is_replaced(tmp_path: Path) -> None:
    """One dies and another comes; later one starts anew under its old name. Both directly and by /sd."""
    each, streams, second = 50.0, 4, 0.5
    source = Source()
    recorder = Recorder(MetricsSettings(), SloSettings())
    fleet = Fleet(source)
    exporter = Exporter(recorder, lambda: Waiting({}, {}), fleet=fleet)

    @asynccontextmanager
    async def closing() -> AsyncIterator[None]:
        yield
        await fleet.close()

    with ExitStack() as stack:
        loads = []

        def start(name: str, engines: ExitStack) -> None:
            port = engines.enter_context(serving(NullEngine(tokens_per_second=each)))
            loads.append(Streams(port, streams))
            loads[-1].start()
            source.add(name, port)

        engines = {name: stack.enter_context(ExitStack()) for name in "abc"}
        start("a", engines["a"])
        start("b", engines["b"])
        port = stack.enter_context(serving(MetricsRoutes(exporter), beside=closing()))
        scraping = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
            "scrape_configs": [
                {"job_name": "gateway", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]},
                {
                    "job_name": "replicas",
                    "http_sd_configs": [{"url": f"http://127.0.0.1:{port}/sd", "refresh_interval": "1s"}],
                },
            ],
        }
        prometheus = stack.enter_context(running_prometheus(tmp_path, json.dumps(scraping)))
        began = time.time()
        time.sleep(6)
        engines["b"].close()
        time.sleep(1.5)
        del source.views["b"]
        start("c", engines["c"])
        time.sleep(5)
        engines["a"].close()
        start("a", engines["a"])  # as a process that its supervisor has started anew
        time.sleep(5)
        ended = time.time()
        for load in loads:
            load.stop.set()
        for job in ("gateway", "replicas"):
            assert prometheus.query(f'count({TOKENS}{{job="{job}"}}) > 0'), job
        rates = []
        for expression in (
            f'sum(rate({TOKENS}{{job="gateway"}}[4s]))',
            f'rate(sum({TOKENS}{{job="gateway"}})[4s:500ms])',
        ):
            (series,) = prometheus.query_range(expression, began + 4, ended, second)
            rates.append([float(value) for _, value in series["values"]])
        for load in loads:
            load.join(10)
    most = 2 * streams * each
    for values in rates:
        assert len(values) > 20
        assert max(values) <= 1.25 * most
        assert min(values) >= 0
        assert max(values) > 0.5 * most
