"""A real Prometheus with our configuration, rules and dashboards, on real processes under load."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.grafana.panels import DASHBOARDS
from synthia_vllm.metrics.replicas import STREAM_RESUMES
from tests.conftest import RunningServer
from tests.deploy.test_rules import FOLDER, rules
from tests.prometheus_service import Prometheus, running_prometheus
from tests.running import Running, gateway, null_engine, until

TOKENS_PER_SECOND = 40
# No sample before the first of its kind: a replica lost under a stream, and only in a cluster.
RARE = ("synthia_stream_resumes_total",)
MANY = 20_000


def configuration(name: str, target: str) -> str:
    """Ours, for another address and with scrapes each second."""
    text = (FOLDER / name).read_text().replace("127.0.0.1:8000", target)
    text = text.replace("rules/*.yml", str(FOLDER / "rules" / "*.yml"))
    return re.sub(r"(scrape_interval|evaluation_interval|refresh_interval|scrape_timeout): \d+s", r"\1: 1s", text)


def expressions() -> list[str]:
    """All of the dashboards and the rules. Of alerts what they compare, for most of the time nothing is wrong."""
    found = [expression for one in DASHBOARDS for panel in one.panels for expression, _ in panel.queries]
    found = [re.sub(r"\$(user|replica)\b", ".*", text.replace("$__rate_interval", "10s")) for text in found]
    found += [f"{one.variable_series}{{{one.variable}!=''}}" for one in DASHBOARDS if one.variable]
    found += [rule["record"] for rule in rules("record")] + [rule["expr"] for rule in rules("record")]
    for rule in rules("alert"):
        if "DCGM_" in rule["expr"]:  # of NVIDIA's exporter, on machines with GPUs
            continue
        found += re.split(r"\bunless\b", re.sub(r"(>=|<=|==|>|<) ", r"\1 bool ", rule["expr"]))
    return found


def silent(prometheus: Prometheus) -> list[str]:
    """The expressions that return nothing, also after a while; those on rare events aside."""
    left = [text for text in expressions() if not any(name in text for name in RARE)]
    deadline = time.monotonic() + 60
    while (left := [text for text in left if not prometheus.query(text)]) and time.monotonic() < deadline:
        time.sleep(1)
    return left


def load(url: str, model: str, seconds: float, streams: int = 4) -> None:
    """Streams for so long, and one request of each kind that is counted apart."""
    for kind in ({"max_tokens": 5}, {"max_tokens": 0}, {"messages": "none"}):
        httpx.post(f"{url}/v1/chat/completions", json={"model": model, "messages": ASK, **kind}, timeout=60)
    with loading(url, model, streams):
        time.sleep(seconds)


ASK = [{"role": "user", "content": "What is an orca? " * 20}]


@contextmanager
def loading(url: str, model: str, streams: int) -> Iterator[None]:
    """So many streams at once, one after another; those that break are begun again."""
    over = threading.Event()

    def ask() -> None:
        body = {"model": model, "messages": ASK, "max_tokens": 24, "stream": True}
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.is_set():
                try:
                    client.post("/v1/chat/completions", json=body)
                except httpx.TransportError:
                    over.wait(0.2)

    threads = [threading.Thread(target=ask) for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, list[Running]]]:
    """A gateway in front of two null engines, with a limit that the load meets."""
    folder = tmp_path_factory.mktemp("pair")
    speed = ("--tokens-per-second", str(TOKENS_PER_SECOND))
    engines = [null_engine(folder / f"engine-{n}.log", *speed) for n in range(2)]
    server = gateway(folder, engines)
    try:
        for process in (*engines, server):
            process.start()
        yield server, engines
    finally:
        for process in (server, *engines):
            process.stop()


@pytest.mark.parametrize("config", ["prometheus.yml", "prometheus-cluster.yml"])
def test_every_expression_has_data_from_two_replicas(
    config: str, pair: tuple[Running, list[Running]], tmp_path: Path
) -> None:
    server, engines = pair
    with running_prometheus(tmp_path, configuration(config, f"127.0.0.1:{server.port}")) as prometheus:
        load(server.url, "null", 8)
        assert silent(prometheus) == []
        names = {one["metric"]["replica"] for one in prometheus.query("vllm:num_requests_running")}
        assert names == {f"127.0.0.1:{engine.port}" for engine in engines}
        # Not once by the gateway and once more by the replica itself.
        assert len(prometheus.query("vllm:generation_tokens_total")) == 2
        assert prometheus.query("sum(replica:synthia_up:max)")[0]["value"][1] == "2"


def test_what_is_rare_is_a_series_all_the_same_and_its_expressions_are_right(tmp_path: Path) -> None:
    assert {f"{family.name}_total" for family in STREAM_RESUMES.describe()} == set(RARE)
    with running_prometheus(tmp_path, "{}") as prometheus:
        for text in expressions():
            if any(name in text for name in RARE):
                prometheus.query(text)  # raises for what is no PromQL


@pytest.mark.e2e
def test_every_expression_has_data_from_one_machine(server: RunningServer, tmp_path: Path) -> None:
    """The real engine: vLLM's own names."""
    target = server.url.removeprefix("http://")
    with running_prometheus(tmp_path, configuration("prometheus.yml", target)) as prometheus:
        load(server.url, "synthia", 10, streams=2)
        assert silent(prometheus) == []
        generated = float(prometheus.query("sum(vllm:generation_tokens_total)")[0]["value"][1])
        assert generated > 0


@pytest.mark.parametrize("config", ["prometheus.yml", "prometheus-cluster.yml"])
def test_a_replica_that_is_killed_and_replaced_makes_no_spike_and_no_dip(
    config: str, pair: tuple[Running, list[Running]], tmp_path: Path
) -> None:
    server, engines = pair
    streams = 4
    with running_prometheus(tmp_path, configuration(config, f"127.0.0.1:{server.port}")) as prometheus:
        many = {"model": "null", "messages": ASK, "max_tokens": MANY // 200, "n": 200}
        for engine in engines:  # so much that a counter taken twice, or from zero, would be seen
            httpx.post(f"{engine.url}/v1/chat/completions", json=many, timeout=60).raise_for_status()
        until(lambda: len(prometheus.query(f"vllm:generation_tokens_total >= {MANY}")) == 2, "both are scraped")
        with loading(server.url, "null", streams):
            time.sleep(8)
            start = time.time()
            engines[0].kill()
            until(lambda: prometheus.query("sum(synthia_replica_up) == 1"), "it is seen to be gone")
            time.sleep(3)
            engines[0].start()
            until(lambda: prometheus.query("sum(synthia_replica_up) == 2"), "it is seen to be back")
            time.sleep(8)
            end = time.time()

        def values(expression: str) -> list[float]:
            found = prometheus.query_range(expression, start, end, 1)
            assert len(found) == 1
            return [float(value) for _, value in found[0]["values"]]

        most = 2 * streams * TOKENS_PER_SECOND  # a second; a scrape late or early makes a rate wrong by a part of it
        for expression in (
            "sum(rate(vllm:generation_tokens_total[5s]))",
            "sum(rate(synthia_generation_tokens_total[5s]))",
            "sum(rate(vllm:prompt_tokens_total[5s])) / 10",
        ):
            rates = values(expression)
            assert all(0 <= value <= most for value in rates), (expression, rates)
        assert values("sum(rate(vllm:generation_tokens_total[5s]))")[-1] > 0
        if config == "prometheus.yml":  # the gateway keeps what the dead one counted: the sum itself never falls
            sums = values("sum(vllm:generation_tokens_total)")
            assert sums == sorted(sums)
            assert sums[-1] - sums[0] <= most * (end - start)


def test_the_expressions_are_those_of_the_committed_files() -> None:
    """What is tested above is what Grafana reads."""
    committed = [
        target["expr"]
        for path in sorted(Path(FOLDER.parent / "grafana" / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]
    listed: list[Any] = [expression for one in DASHBOARDS for panel in one.panels for expression, _ in panel.queries]
    assert sorted(committed) == sorted(listed)
