"""How long `serve` takes from its command to the first token, with the demo model on this machine.

    python -m benchmarks.start [--rounds 5] [--output benchmarks/results/start.json]

`forked` is `serve --engine.fork true`, the demo's default; `spawned` is without it, where vLLM spawns one process after
the other. What that costs afterwards: tokens/s of one stream and of 64.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import click
from rich.console import Console

from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.processes import running

SERVE = [sys.executable, "-m", "synthia_vllm", "serve", "--log-file", "-"]
_FORK = {"forked": "true", "spawned": "false"}
_TOKENS = 64
_SECONDS = 10


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--output", default=Path("benchmarks/results/start.json"), type=click.Path(path_type=Path))
def main(rounds: int, output: Path) -> None:
    """Starts each in turn, and writes what it has after every round."""
    console = Console()
    results: interleaved.Results = {}
    pairs = [("forked", "spawned")]
    with tempfile.TemporaryDirectory(prefix="synthia-start-") as folder:
        for number in range(rounds):
            for name in interleaved.in_turn(list(_FORK), number):
                began = time.monotonic()
                environment = {"SYNTHIA_ENGINE__FORK": _FORK[name]}
                with running(name, SERVE, environment, Path(folder), health="/ready") as server:
                    asyncio.run(tokens_per_second(server.url, 1, 0))
                    took = time.monotonic() - began
                    figures = {
                        streams: asyncio.run(tokens_per_second(server.url, streams, _SECONDS)) for streams in (1, 64)
                    }
                interleaved.add(results, "seconds to the first token", name, took)
                for streams, speed in figures.items():
                    interleaved.add(results, f"tokens/s, streams: {streams}", name, speed)
                console.print(f"round {number + 1} of {rounds}: {name} after {took:.1f} s", highlight=False)
            interleaved.write(interleaved.report(machine(), results, pairs, rounds=number + 1), output, console)


async def tokens_per_second(url: str, streams: int, seconds: float) -> float:
    """Tokens a second of so many clients, each of which asks anew until the time is over; at least once."""
    until, made, began = time.monotonic() + seconds, 0, time.monotonic()
    body = {"model": "synthia", "prompt": "Tell me", "ignore_eos": True, "max_tokens": _TOKENS if seconds else 1}

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal made
        while True:
            async with http.post(f"{url}/v1/completions", json=body, raise_for_status=True) as reply:
                made += (await reply.json())["usage"]["completion_tokens"]
            if time.monotonic() >= until:
                return

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(client(http) for _ in range(streams)))
    return made / (time.monotonic() - began)


if __name__ == "__main__":
    main()
