"""How long users wait for their first token while thousands of others hold connections and ask for nothing.

    python -m benchmarks.open_connections [--rounds 5] [--output benchmarks/results/open_connections.json]

One gateway, the full stack over the null engine's port, at a pace as a real engine has it. Each round loads it twice:
users with streams are alone, or beside a crowd, a third of it idle after a reply, a third with half of their headers
sent, a third with a body of which a byte comes each second; whoever is cut comes again.
"""

import asyncio
import multiprocessing
import resource
import signal
import sys
import tempfile
from contextlib import contextmanager, nullcontext, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console

from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.processes import running
from synthia_vllm.bench.streams import chat, load, port_of

LATE, TTFT = "TTFT p95, ms", "TTFT p50, ms"
TARGET = 1.5
RATE, TOKENS, SPREAD_S = 10, 80, 8.0  # a second, of each stream; all begin in the time that one takes
_IDLE = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
_HALF_SENT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
_SLOW = _HALF_SENT + b"content-length: 100000\r\n\r\n"
_OPENED_A_TURN, _TURN_S = 20, 0.05


async def member(port: int, sent: bytes) -> None:
    """One of the crowd: comes, and comes again when it is cut."""
    while True:
        with suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            while not reader.at_eof():
                with suppress(TimeoutError):
                    async with asyncio.timeout(1 if sent is _SLOW else None):
                        await reader.read(65536)
                writer.write(b" " if sent is _SLOW else b"")
            writer.close()


def crowd(port: int, count: int, complete: Any) -> None:
    """So many members, in a process of their own, until it is ended. `complete` is set when all are there."""

    async def stay() -> None:
        members = []
        for number, sent in enumerate(islice(cycle((_IDLE, _HALF_SENT, _SLOW)), count)):
            members.append(asyncio.create_task(member(port, sent)))
            if not number % _OPENED_A_TURN:
                await asyncio.sleep(_TURN_S)
        await asyncio.sleep(1)
        complete.set()
        await asyncio.gather(*members)

    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    uvloop.run(stay())


@contextmanager
def beside(port: int, count: int) -> Any:
    spawning = multiprocessing.get_context("spawn")
    complete = spawning.Event()
    process = spawning.Process(target=crowd, args=(port, count, complete), daemon=True)
    process.start()
    try:
        if not complete.wait(120):
            raise click.ClickException("the crowd's connections are refused")
        yield
    finally:
        process.kill()
        process.join()


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option("--count", type=click.IntRange(3), default=4000, show_default=True, help="Connections of the crowd.")
@click.option("--users", type=click.IntRange(1), default=1000, show_default=True, help="With a stream each.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "open_connections.json",
    show_default="benchmarks/results/open_connections.json",
)
def main(rounds: int, count: int, users: int, output: Path) -> None:
    """Measure the first token with and without a crowd of open connections."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: interleaved.Results = {}
    with tempfile.TemporaryDirectory(prefix="synthia-bench-") as folder:
        command = [sys.executable, "-m", "synthia_vllm.bench.stack", "--tokens-per-second", str(RATE)]
        with running("gateway", command, {"SYNTHIA_DATA": folder}, Path(folder)) as gateway:
            port = port_of(gateway.url)
            for number in range(-1, rounds):  # round -1 warms up and is not counted
                for name in interleaved.in_turn(["alone", "beside"], number):
                    with beside(port, count) if name == "beside" else nullcontext():
                        clients = [[chat("null", TOKENS, salt=f"{number}-{one}")] for one in range(users)]
                        first = sorted(uvloop.run(load(port, clients, spread=SPREAD_S)).first)
                    if number >= 0:
                        interleaved.add(results, LATE, name, 1000 * first[int(0.95 * len(first))])
                        interleaved.add(results, TTFT, name, 1000 * first[len(first) // 2])
                console.print(f"round {number + 1} of {rounds} done", highlight=False)
    told = {"rounds": rounds, "crowd": count, "users": users, "rate": RATE, "tokens": TOKENS, "spread_s": SPREAD_S}
    report = interleaved.report(machine(), results, [("beside", "alone")], target=TARGET, **told)
    interleaved.write(report, output, console)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
