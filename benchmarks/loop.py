"""How long one request can hold the event loop that is everybody's, by what a gateway allows.

    python -m benchmarks.loop [--repeats 2] [--only prompt] [--where] [--output benchmarks/results/loop.json]

The whole stack runs in this process over stand-in engines with the demo model's real tokenizer; requests come from
another process over HTTP. A task that wants to run each millisecond tells how late it came, at worst, until a request
was over: `held`. `own` is how much of such a wait this process was at work, all its threads together: on a busy machine
the wait is the machine's, the work is ours. The medians of the repeats count.

`--where` prints where every thread was whenever the loop had been held for longer than the target.
"""

import asyncio
import contextlib
import faulthandler
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import click
import uvloop
from rich.console import Console

from benchmarks.loop_cases import Case, cases
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.rounds import Results, add, report, write
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.listener import DrainingServer, bind, settle_memory
from synthia_vllm.gateway.observers.log import configure_logging
from synthia_vllm.settings import Settings

TARGET_MS = 20.0
HELD, OWN = "held, ms", "own, ms"
_TICK_S = 0.001
_PATIENCE_S = 300.0


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True, help="Of each case.")
@click.option("--only", default="", help="Cases with this in their name.")
@click.option("--where", is_flag=True, help="Print what held the loop for longer than the target.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "loop.json",
    show_default="benchmarks/results/loop.json",
)
def main(repeats: int, only: str, where: bool, output: Path) -> None:
    """Measure the longest time that one request holds the event loop."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [case for case in cases() if only in case.name]
    results = uvloop.run(measure(chosen, repeats, where, console))
    write(report(machine(), results, [], repeats=repeats, target_ms=TARGET_MS), output, console)
    over = [case for case, found in results.items() if statistics.median(found[HELD]) > TARGET_MS]
    console.print("over the target:", ", ".join(over) or "none", highlight=False)


async def measure(chosen: list[Case], repeats: int, where: bool, console: Console) -> Results:
    """Milliseconds of each repeat, by the case's name and the status that it got."""
    found: Results = {}
    for at, case in enumerate(chosen, start=1):
        console.print(f"{at} of {len(chosen)}: {case.name}", highlight=False)
        body = case.body()
        async with serving(case) as (gateway, port):
            for number in range(-1, repeats):  # repeat -1 fills the caches that all requests share
                late, status = await held_by(case, body, gateway, port, where and number >= 0)
                if number >= 0:
                    add(found, f"{case.name}: {status}", HELD, 1000 * late.held)
                    add(found, f"{case.name}: {status}", OWN, 1000 * late.own)
                    console.print(
                        f"  {1000 * late.held:.1f} ms, own {1000 * late.own:.1f} ms, {status}", highlight=False
                    )
    return found


@contextlib.asynccontextmanager
async def serving(case: Case) -> AsyncGenerator[tuple[Gateway, int], None]:
    """The stack over the case's engine, and its port."""
    with tempfile.TemporaryDirectory() as folder:
        access = {"mode": "open", "database": f"sqlite:///{folder}/keys.db", "secret": "x" * 32}
        settings = Settings(port=0, access=access, log={"requests": False})  # type: ignore[arg-type]
        configure_logging(settings.log)
        sock = bind(settings)
        async with Gateway(case.engine(), settings) as gateway:
            listening = asyncio.Event()
            server = DrainingServer(gateway.app, settings, listening.set)
            settle_memory()  # as both of our servers do
            running = asyncio.create_task(server.run_until_stopped(sock))
            await listening.wait()
            try:
                yield gateway, int(sock.getsockname()[1])
            finally:
                server.stop()
                await running
                sock.close()


async def held_by(case: Case, body: bytes, gateway: Gateway, port: int, where: bool) -> tuple["Lateness", str]:
    """How late the loop's ticks were, at worst, until one request was over; and the request's status."""
    words = ["-m", "benchmarks.loop_client", str(port), case.path, case.encoding, *case.stay]
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(sys.executable, *words, stdin=pipe, stdout=pipe)
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(body)
    client.stdin.close()
    await client.stdout.readline()  # it has the body, and sends it now
    late = Lateness()
    ticking = asyncio.create_task(tick(late, where))
    try:
        async with asyncio.timeout(_PATIENCE_S):
            status = (await client.stdout.readline()).decode().strip()
            while gateway.access.open:
                await asyncio.sleep(_TICK_S)
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        faulthandler.cancel_dump_traceback_later()
        if client.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                client.kill()
        await client.wait()
    if not status or status.startswith("500"):
        raise click.ClickException(f"{case.name}: {status or 'no answer'}; how long that took tells nothing")
    return late, status


class Lateness:
    """The worst of all ticks, in seconds."""

    held = 0.0
    own = 0.0


async def tick(late: Lateness, where: bool) -> None:
    while True:
        if where:
            faulthandler.dump_traceback_later(TARGET_MS / 1000)
        began, worked = time.perf_counter(), time.process_time()
        await asyncio.sleep(_TICK_S)
        held = time.perf_counter() - began - _TICK_S
        late.held = max(late.held, held)
        late.own = max(late.own, min(held, time.process_time() - worked))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
