"""What our layers cost, with no inference in the way: the full stack around a null engine, against the bare one.

    python -m benchmarks.cost [--rounds 5] [--output benchmarks/results/cost.json]

bare      the null engine under uvicorn (uvloop, httptools)
stack     the same behind all layers, in the same process
gateway   `synthia-vllm gateway` in front of a null engine in another process

The server has one core, the client (and the gateway's null engine) the other. All run side by side; each round loads
them in turn, ratios are taken within a round.
"""

import asyncio
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine
from synthia_vllm import __version__

STREAMS = 32
OPEN_STREAMS = 5000
TTFT_REQUESTS = 200
_SERVER_CORE, _CLIENT_CORE = 0, 1
_READ = 1 << 18


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option("--seconds", default=3.0, show_default=True, help="Of full load, each.")
@click.option("--streams", default=OPEN_STREAMS, show_default=True, help="Open at once for the memory's figure.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "cost.json",
    show_default="benchmarks/results/cost.json",
)
def main(rounds: int, seconds: float, streams: int, output: Path) -> None:
    """Measure chunks a second, time to first token and memory a stream, with and without our layers."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = measured(rounds, seconds, streams, lambda text: console.print(text, highlight=False))
    output.write_text(json.dumps(report, indent=1) + "\n")
    show(report, console)
    console.print(f"written to {output}", highlight=False)


def measured(rounds: int, seconds: float, streams: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole measurement, with its servers. Leaves this process on one core while it lasts."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cores = os.sched_getaffinity(0)
    try:
        return _measured(rounds, seconds, streams, say)
    finally:
        os.sched_setaffinity(0, cores)


def _measured(rounds: int, seconds: float, streams: int, say: Callable[[str], None]) -> dict[str, Any]:
    where = machine()  # before this process is put on one core
    os.sched_setaffinity(0, {_CLIENT_CORE % os.cpu_count()})  # type: ignore[operator]
    results: dict[str, dict[str, list[float]]] = {"chunks a second": {}, "median TTFT, ms": {}, "KB a stream": {}}
    with ExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory())
        bare, behind = free_port(), free_port()
        servers = {
            "bare": stack.enter_context(server(data, _SERVER_CORE, "benchmarks.null_engine", "--port", str(bare))),
            "stack": stack.enter_context(server(data, _SERVER_CORE, "benchmarks.stack", "--port", str(behind))),
        }
        ports = {"bare": bare, "stack": behind, "gateway": free_port()}
        far = free_port()
        stack.enter_context(server(data, _CLIENT_CORE, "benchmarks.null_engine", "--port", str(far)))
        wait_for(far)
        words = ["gateway", "--port", str(ports["gateway"]), "--upstream", f"http://127.0.0.1:{far}"]
        stack.enter_context(server(data, _SERVER_CORE, "synthia_vllm", *words))
        for port in ports.values():
            wait_for(port)
        for number in range(-1, rounds):
            for name, port in ports.items():
                rate = uvloop.run(chunks_a_second(port, seconds if number >= 0 else 1.0))
                if number >= 0:
                    results["chunks a second"].setdefault(name, []).append(rate)
            waits = uvloop.run(first_tokens({name: ports[name] for name in servers}))
            if number >= 0:
                for name, times in waits.items():
                    results["median TTFT, ms"].setdefault(name, []).append(1000 * statistics.median(times))
            say(f"round {number + 1} of {rounds} done")
        for name, module in (("bare", "benchmarks.null_engine"), ("stack", "benchmarks.stack")):
            port = free_port()
            slow = ["--port", str(port), "--tokens-per-second", "0.2"]
            with server(data, _SERVER_CORE, module, *slow) as process:
                wait_for(port)
                results["KB a stream"][name] = [uvloop.run(memory_a_stream(process, port, streams))]
    report: dict[str, Any] = {"machine": where, "version": __version__, "rounds": rounds, "open_streams": streams}
    return report | {"results": results, "summary": summary(results)}


def show(report: dict[str, Any], console: Console) -> None:
    shown = Table("figure", "median of rounds")
    for figure, value in report["summary"].items():
        shown.add_row(figure, str(value))
    console.print(shown)


@contextmanager
def server(data: str, core: int, module: str, *words: str) -> Iterator[psutil.Process]:
    """A server on one core, with a database of its own; stopped at the end."""
    # Nothing is to queue: the streams are as good as endless.
    room = {"SYNTHIA_FAIR__MAX_IN_FLIGHT_TOKENS": str(10**12), "SYNTHIA_LOG__REQUESTS": "false"}
    environment = {**os.environ, "SYNTHIA_DATA": data, **room}
    process = subprocess.Popen(
        ["taskset", "-c", str(core % (os.cpu_count() or 1)), sys.executable, "-m", module, *words],
        env=environment,
        start_new_session=True,
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(port: int, timeout: float = 60.0) -> None:
    """Until something listens. Raises ClickException after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise click.ClickException(f"nothing listens on port {port}")


def request(tokens: int) -> bytes:
    messages = [{"role": "user", "content": "What is an orca, and what does it eat?"}]
    body = json.dumps({"model": "synthia", "messages": messages, "max_tokens": tokens, "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Counter(asyncio.Protocol):
    """Sends one request and counts the chunks of what comes, without looking into them."""

    def __init__(self, wanted: bytes) -> None:
        self.chunks = 0
        self.first = asyncio.get_running_loop().create_future()
        self._wanted = wanted

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport
        transport.write(self._wanted)

    def data_received(self, data: bytes) -> None:
        found = data.count(b"\ndata: ") + data.startswith(b"data: ")
        self.chunks += found
        # The first chunk of a chat has the role only.
        if self.chunks > 1 and not self.first.done():
            self.first.set_result(time.perf_counter())


async def connect(port: int, tokens: int) -> Counter:
    loop = asyncio.get_running_loop()
    _, counter = await loop.create_connection(lambda: Counter(request(tokens)), "127.0.0.1", port)
    return counter


async def begun(counters: list[Counter]) -> None:
    """Until each has its first token; an error of asyncio's if one has none after a minute and a half."""
    await asyncio.wait_for(asyncio.gather(*(counter.first for counter in counters)), 90)


async def chunks_a_second(port: int, seconds: float) -> float:
    """32 streams that never end, for so long."""
    counters = [await connect(port, 10_000_000) for _ in range(STREAMS)]
    await begun(counters)
    before, began = sum(counter.chunks for counter in counters), time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (sum(counter.chunks for counter in counters) - before) / (time.perf_counter() - began)
    for counter in counters:
        counter.transport.abort()
    await asyncio.sleep(0.5)
    return rate


async def first_tokens(ports: dict[str, int]) -> dict[str, list[float]]:
    """Seconds to the first token of one stream at a time, the servers taking turns."""
    found: dict[str, list[float]] = {name: [] for name in ports}
    for _ in range(TTFT_REQUESTS):
        for name, port in ports.items():
            began = time.perf_counter()
            counter = await connect(port, 2)
            found[name].append(await counter.first - began)
            counter.transport.abort()
    return found


async def memory_a_stream(process: psutil.Process, port: int, streams: int) -> float:
    """KB of the server's memory for each of so many open streams."""
    warm = [await connect(port, 1000) for _ in range(50)]
    await begun(warm)
    before = process.memory_info().rss
    counters = []
    for _ in range(streams):
        counters.append(await connect(port, 1000))
    await begun(counters)
    grown = process.memory_info().rss - before
    for counter in [*warm, *counters]:
        counter.transport.abort()
    return grown / 1024 / streams


def summary(results: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    rates, waits = results["chunks a second"], results["median TTFT, ms"]
    pairs = [a / b for a, b in zip(rates["stack"], rates["bare"], strict=True)]
    added = [a - b for a, b in zip(waits["stack"], waits["bare"], strict=True)]
    found: dict[str, float] = {
        f"{name}: chunks a second": round(statistics.median(values)) for name, values in rates.items()
    }
    found |= {"stack / bare": round(statistics.median(pairs), 3)}
    found |= {"added to the median TTFT, ms": round(statistics.median(added), 3)}
    return found | {f"{name}: KB a stream": round(values[0], 1) for name, values in results["KB a stream"].items()}


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    rows = (f"| {name} | {value} |\n" for name, value in report["summary"].items())
    return "| figure | median of rounds |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
