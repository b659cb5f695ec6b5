"""What the exporter costs and how right it is, with no inference in the way.

    python -m benchmarks.exporter [--rounds 7] [--seconds 60] [--output benchmarks/results/exporter.json]

a chunk     the counting of one streamed chunk by itself; and what a chunk through all layers takes more with it
a scrape    of a gateway with 200 users of 3 models and 16 replicas that answer with vLLM's page over HTTP; how late a
            task that wants to run each millisecond comes meanwhile, against without a scrape: what a stream would feel
the page    in kB after 200 and after 10,000 users
tokens/s    the gauge against what clients got in the same ten seconds, each second of a steady minute
"""

import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console
from rich.table import Table
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm import __version__
from synthia_vllm.bench.ceiling import server
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.bench.streams import COMPLETIONS, port_of, wait_for
from synthia_vllm.free_ports import free_port
from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.apis import Apis
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.observers.metrics import Metrics
from synthia_vllm.gateway.request import Exchange, Observer
from synthia_vllm.gateway.sequences import Sequences
from synthia_vllm.metrics.exporter import Exporter
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.replicas import ReplicaView
from synthia_vllm.settings import MetricsSettings, Settings, SloSettings

REPLICAS, USERS, MANY_USERS, MODELS = 16, 200, 10_000, 3
STREAMS, RATE = 64, 20.0  # of the steady minute
CHUNKS = 100_000


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="Of steady load for the gauge.")
@click.option("--serve-pages", "ports", help="Only serve the replicas' pages, on these ports.", hidden=True)
@click.option("--port", hidden=True, type=int)
@click.option("--host", hidden=True)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "exporter.json",
    show_default="benchmarks/results/exporter.json",
)
def main(rounds: int, seconds: float, ports: str | None, port: int, host: str, output: Path) -> None:
    """Measure the exporter: cost of a chunk, of a scrape, size of the page, and the gauge of tokens a second."""
    if ports is not None:
        uvloop.run(serve_pages([port, *map(int, ports.split(","))]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where = machine()
    os.sched_setaffinity(0, {0})
    results = uvloop.run(measure(rounds, seconds))
    report = {"machine": where, "version": __version__, "rounds": rounds, "results": results}
    report["summary"] = summary(results)
    output.write_text(json.dumps(report, indent=1) + "\n")
    shown = Table("figure", "value")
    for figure, value in report["summary"].items():
        shown.add_row(figure, str(value))
    Console().print(shown)


async def measure(rounds: int, seconds: float) -> dict[str, Any]:
    results: dict[str, Any] = {"counting": [counting() for _ in range(rounds)], "layers": {"with": [], "without": []}}
    apps = {"with": layers([Metrics(Recorder(MetricsSettings(), SloSettings()))]), "without": layers([])}
    for number in range(-1, rounds):
        for name, app in apps.items():
            took = await through(app)
            if number >= 0:
                results["layers"][name].append(took)
    with tempfile.TemporaryDirectory() as data:
        others = [free_port() for _ in range(REPLICAS - 1)]
        words = ("benchmarks.exporter", "--serve-pages", ",".join(map(str, others)))
        with server("pages", 1, words, Path(data)) as pages:
            for port in others:
                wait_for(port)
            results["scrape"] = await scrapes([port_of(pages.url), *others], 3 * rounds)
        access = {"mode": "open", "database": f"sqlite:///{data}/keys.db", "secret": "x" * 32}
        fair = {"max_in_flight_tokens": 10**12}
        settings = Settings(access=access, fair=fair, log={"requests": False})  # type: ignore[arg-type]
        async with Gateway(NullEnginePort(context=None, tokens_per_second=RATE), settings) as gateway:
            results["gauge"] = await steady(gateway, seconds)
    return results


def layers(observers: Sequence[Observer]) -> ASGIApp:
    """All that a chunk passes, told to these observers."""
    engine = NullEnginePort(context=None)
    apis = Apis(engine, Sequences(Meter(engine)), Settings().prompt, observers=observers)

    async def nobody(key: str) -> Account | None:
        return None

    return Access(apis, lookup=nobody, keys_required=False, observers=observers)


def counting() -> float:
    """Processor seconds for one chunk, the loop around it taken off."""
    metrics = Metrics(Recorder(MetricsSettings(), SloSettings()))
    exchange = answered("alice", "synthia")
    metrics.opened(exchange)
    sent, times = metrics.sent, []
    for told in (sent, lambda exchange, chunks, tokens: None):
        began = time.process_time()
        for _ in range(CHUNKS):
            told(exchange, 1, 1)
        times.append(time.process_time() - began)
    return (times[0] - times[1]) / CHUNKS


def answered(user: str, model: str) -> Exchange:
    exchange = Exchange(id=f"{user}-{model}", request_id="r", route=COMPLETIONS, account=Account(user), model=model)
    exchange.status, exchange.outcome = 200, "finished"
    exchange.usage.accepted, exchange.usage.prompt, exchange.usage.dispatched = True, 10, exchange.arrived
    return exchange


def asked(tokens: int) -> tuple[Scope, Receive]:
    """A streamed completion, as an ASGI server hands it over; its client stays."""
    body = json.dumps({"model": "null", "prompt": "x", "max_tokens": tokens, "stream": True}).encode()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    about = {"type": "http", "http_version": "1.1", "method": "POST", "path": COMPLETIONS, "headers": headers}
    return about, receive


async def through(app: ASGIApp) -> float:
    """Processor seconds for one chunk of a stream through the layers, without a socket."""

    async def send(message: Message) -> None:
        pass

    scope, receive = asked(CHUNKS)
    began = time.process_time()
    await app(scope, receive, send)
    return (time.process_time() - began) / CHUNKS


class Ports:
    def __init__(self, ports: list[int]) -> None:
        self._views = [ReplicaView(f"replica-{port}", f"http://127.0.0.1:{port}", "up", 0) for port in ports]

    def replicas(self) -> list[ReplicaView]:
        return self._views


async def scrapes(ports: list[int], count: int) -> dict[str, Any]:
    recorder = Recorder(MetricsSettings(), SloSettings())
    metrics = Metrics(recorder)
    found: dict[str, Any] = {"seconds": [], "cpu": [], "late": [], "late_alone": []}
    for user in range(MANY_USERS):
        for model in range(MODELS):
            exchange = answered(f"user-{user}", f"model-{model}")
            metrics.opened(exchange)
            for _ in range(2):
                exchange.usage.generated += 1
                metrics.sent(exchange, 1, 1)
            metrics.ended(exchange)
        if user + 1 in (USERS, MANY_USERS):
            page = await Exporter(recorder, lambda: Waiting({}, {})).page()
            found[f"kB_{user + 1}"] = len(page) / 1000
    # Patient: all of the page is to be there. By default, what takes longer than 0.2 s comes with the next scrape.
    exporter = Exporter(recorder, lambda: Waiting({}, {}), fleet=Fleet(Ports(ports)), wait=5.0)
    assert exporter.fleet is not None
    await exporter.page()
    late: deque[float] = deque()
    watch = asyncio.create_task(lateness(late))
    for _ in range(count):
        await asyncio.sleep(0.3)
        late.clear()
        await asyncio.sleep(0.3)
        found["late_alone"].append(max(late))
        late.clear()
        began, worked = time.perf_counter(), time.process_time()
        page = await exporter.page(openmetrics=True)
        found["seconds"].append(time.perf_counter() - began)
        found["cpu"].append(time.process_time() - worked)
        await asyncio.sleep(0.01)
        found["late"].append(max(late))
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    await exporter.fleet.close()
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    found["lines"] = len(lines)
    found["replicas_seen"] = len({line.split('replica="')[1].split('"')[0] for line in lines if "vllm:" in line})
    return found


async def lateness(late: "deque[float]") -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(time.perf_counter() - began - 0.001)


async def steady(gateway: Gateway, seconds: float) -> dict[str, list[float]]:
    """The gauge each second, and what clients got over the same ten seconds."""
    got = 0

    async def stream() -> None:
        async def send(message: Message) -> None:
            nonlocal got
            got += message.get("body", b"").count(b'"text":')

        scope, receive = asked(10**6)
        await gateway.app(scope, receive, send)

    tasks = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    seen: deque[tuple[float, int]] = deque(maxlen=11)
    found: dict[str, list[float]] = {"told": [], "got": []}
    for number in range(int(seconds) + 12):
        await asyncio.sleep(1)
        seen.append((time.perf_counter(), got))
        if number < 12:
            continue
        (began, before), (now, after) = seen[0], seen[-1]
        found["got"].append((after - before) / (now - began))
        found["told"].append(sum(rate for _, _, rate in gateway.exporter.recorder.rates.rates()))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


async def serve_pages(ports: list[int]) -> None:
    """vLLM's page, as long as vLLM 0.29's, on each port."""
    import uvicorn

    page = vllm_page()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(page)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": page})

    configs = [uvicorn.Config(app, port=port, log_level="warning", lifespan="off") for port in ports]
    await asyncio.gather(*(uvicorn.Server(config).serve() for config in configs))


def vllm_page() -> bytes:
    registry = CollectorRegistry()
    labels = {"engine": "0", "model_name": "migtissera/Synthia-v3.0-11B"}
    for number in range(16):
        buckets = [0.001 * 1.5**step for step in range(28)]
        histogram = Histogram(f"vllm:times_{number}", "Times.", [*labels], registry=registry, buckets=buckets)
        for value in range(100):
            histogram.labels(**labels).observe(value / 50)
    for number in range(24):
        Counter(f"vllm:counts_{number}", "Counts.", [*labels], registry=registry).labels(**labels).inc(1e6 + number)
        Gauge(f"vllm:gauges_{number}", "Gauges.", [*labels], registry=registry).labels(**labels).set(number / 7)
    return generate_latest(registry)


def summary(results: dict[str, Any]) -> dict[str, float]:
    scrape, gauge, layers = results["scrape"], results["gauge"], results["layers"]
    more = [1e6 * (a - b) for a, b in zip(layers["with"], layers["without"], strict=True)]
    apart = [abs(told / got - 1) for told, got in zip(gauge["told"], gauge["got"], strict=True)]
    return {
        "counting one chunk, µs": round(1e6 * statistics.median(results["counting"]), 2),
        "one chunk through all layers, more with the exporter than without, µs": round(statistics.median(more), 2),
        "a scrape of 16 replicas and 200 users, median, ms": round(1000 * statistics.median(scrape["seconds"]), 1),
        "the longest of them, ms": round(1000 * max(scrape["seconds"]), 1),
        "of the median, the gateway's processor, ms": round(1000 * statistics.median(scrape["cpu"]), 1),
        "lines of that page": scrape["lines"],
        "longest hold-up of a stream by a scrape, median, ms": round(1000 * statistics.median(scrape["late"]), 1),
        "the same without a scrape, ms": round(1000 * statistics.median(scrape["late_alone"]), 1),
        "page after 200 users of 3 models, kB": round(scrape["kB_200"]),
        "page after 10,000 users, kB": round(scrape["kB_10000"]),
        "tokens/s gauge against the clients' count, farthest apart in a minute, %": round(100 * max(apart), 2),
    }


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    rows = (f"| {name} | {value} |\n" for name, value in report["summary"].items())
    return "| figure | value |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
