"""How long one request can hold the event loop that is everybody's, by what a gateway allows.

    python -m benchmarks.loop [--repeats 5] [--only prompt] [--where] [--output benchmarks/results/loop.json]

The whole stack runs in this process over stand-in engines with the demo model's real tokenizer; requests come from
another process over HTTP. A task that wants to run each millisecond tells how late it came while a request was under
way. The median of the repeats counts: what the request does comes again each time, a busy machine does not.

`--where` prints where every thread was whenever the loop had been held for longer than the target.
"""

import asyncio
import contextlib
import faulthandler
import http.client
import json
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
from rich.table import Table

from benchmarks.loop_cases import Case, cases
from benchmarks.serving import machine
from synthia_vllm import __version__
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.listener import DrainingServer, bind
from synthia_vllm.gateway.observers.log import configure_logging
from synthia_vllm.settings import Settings

TARGET_MS = 20.0
_TICK_S = 0.001
_PATIENCE_S = 300.0


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of each case.")
@click.option("--only", default="", help="Cases with this in their name.")
@click.option("--where", is_flag=True, help="Print what held the loop for longer than the target.")
@click.option("--send", type=int, hidden=True, help="Only send what comes on standard input to this port.")
@click.option("--path", hidden=True, default="/v1/chat/completions")
@click.option("--encoding", hidden=True, default="identity")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "loop.json",
    show_default="benchmarks/results/loop.json",
)
def main(repeats: int, only: str, where: bool, send: int | None, path: str, encoding: str, output: Path) -> None:
    """Measure the longest time that one request holds the event loop."""
    if send is not None:
        send_body(send, path, encoding)
        return
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = uvloop.run(measure([case for case in cases() if only in case.name], repeats, where, console))
    summary = {name: round(statistics.median(found), 1) for name, found in results.items()}
    report = {"machine": machine(), "version": __version__, "repeats": repeats, "target_ms": TARGET_MS}
    report |= {"results": results, "summary": summary}
    shown = Table("request", "status", "held, ms", "least", "greatest", "")
    for name, found in results.items():
        verdict = "" if summary[name] <= TARGET_MS else "over the target"
        case, _, status = name.rpartition(": ")
        shown.add_row(case, status, f"{summary[name]}", f"{min(found):.1f}", f"{max(found):.1f}", verdict)
    console.print(shown)
    output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {output}", highlight=False)


async def measure(chosen: list[Case], repeats: int, where: bool, console: Console) -> dict[str, list[float]]:
    """Milliseconds of each repeat, by the case's name and the status that it got."""
    found: dict[str, list[float]] = {}
    for case in chosen:
        console.print(case.name, highlight=False)
        body = case.body()
        async with serving(case) as port:
            for number in range(-1, repeats):  # repeat -1 fills the caches that all requests share
                held, status = await held_by(case, body, port, where and number >= 0)
                if number >= 0:
                    found.setdefault(f"{case.name}: {status}", []).append(1000 * held)
                    console.print(f"  {1000 * held:.1f} ms, {status}", highlight=False)
    return found


@contextlib.asynccontextmanager
async def serving(case: Case) -> AsyncGenerator[int, None]:
    """The stack over the case's engine; yields its port."""
    with tempfile.TemporaryDirectory() as folder:
        access = {"mode": "open", "database": f"sqlite:///{folder}/keys.db", "secret": "x" * 32}
        settings = Settings(port=0, access=access, log={"requests": False})  # type: ignore[arg-type]
        configure_logging(settings.log)
        sock = bind(settings)
        async with Gateway(case.engine(), settings) as gateway:
            listening = asyncio.Event()
            server = DrainingServer(gateway.app, settings, listening.set)
            running = asyncio.create_task(server.run_until_stopped(sock))
            await listening.wait()
            try:
                yield int(sock.getsockname()[1])
            finally:
                server.stop()
                await running
                sock.close()


async def held_by(case: Case, body: bytes, port: int, where: bool) -> tuple[float, str]:
    """How late the loop's ticks were while one request was answered, at worst, in seconds; and the request's status."""
    words = ["-m", "benchmarks.loop", "--send", str(port), "--path", case.path, "--encoding", case.encoding]
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(sys.executable, *words, stdin=pipe, stdout=pipe)
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(body)
    client.stdin.close()
    await client.stdout.readline()  # it has the body, and sends it now
    late = [0.0]
    ticking = asyncio.create_task(tick(late, where))
    try:
        status = (await asyncio.wait_for(client.stdout.readline(), _PATIENCE_S)).decode().strip()
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        faulthandler.cancel_dump_traceback_later()
        if client.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                client.kill()
        await client.wait()
    if not status:
        raise click.ClickException(f"{case.name}: no answer")
    return max(late), status


async def tick(late: list[float], where: bool) -> None:
    while True:
        if where:
            faulthandler.dump_traceback_later(TARGET_MS / 1000)
        began = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        late[0] = max(late[0], time.perf_counter() - began - _TICK_S)


def send_body(port: int, path: str, encoding: str) -> None:
    """The client: says when it begins, reads the whole reply, and tells its status."""
    body = sys.stdin.buffer.read()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    print("ready", flush=True)
    connection.request("POST", path, body, {"content-type": "application/json", "content-encoding": encoding})
    reply = connection.getresponse()
    length = len(reply.read())
    print(f"{reply.status}, {length / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
