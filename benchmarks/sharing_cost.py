"""What it costs a gateway that it shares its queue with another one, which can go on with its replies.

alone    limits, queue and replies are in its process
limits   limits in Redis; no other gateway is there, no reply is kept
shared   another gateway is there: one queue for both, and each reply is kept, since its client names its request

    python -m benchmarks.sharing_cost [--rounds 6] [--streams 64]

A stand-in sends tokens as fast as it can, and at 40 a second to each stream, as an engine does. The gateways have one
core, clients, engines and Redis the other. Figures: tokens a second and processor a token of 64 streams at once, their
median time to the first token, and that of one stream at a time.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

import click
import uvloop
from rich.console import Console

from benchmarks.soak_stores import redis_in, running
from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench import streams
from synthia_vllm.bench.ceiling import server
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.null.tokenizer import write
from synthia_vllm.bench.processes import RunningServer

KINDS = ALONE, LIMITS, SHARED = "alone", "limits", "shared"
PAIRS = ((SHARED, LIMITS), (LIMITS, ALONE), (SHARED, ALONE))
TOKENS, REQUESTS = 200, 100
LOADS: Mapping[str, Sequence[str]] = {"full speed": (), "paced": ("--tokens-per-second", "40")}
_SERVER, _CLIENT = 0, 1


@click.command()
@click.option("--rounds", default=6, show_default=True)
@click.option("--streams", "count", default=64, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Of full load, each.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "sharing_cost.json",
    show_default=False,
)
def main(rounds: int, count: int, seconds: float, output: Path) -> None:
    """Measure gateways without Redis, with limits in it, and with all that they can share."""
    results: interleaved.Results = {}
    os.sched_setaffinity(0, {_CLIENT})
    for load, options in LOADS.items():
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            gateways = _gateways(folder, options, stack)
            key = {"authorization": f"Bearer {make_key('bench', data=folder)}"}
            for number in range(-1, rounds):  # round -1 warms up and is not counted
                for kind in interleaved.in_turn(KINDS, number):
                    found = _measured(gateways[kind], partial(_asked, key, named=kind == SHARED), count, seconds)
                    for figure, value in found.items() if number >= 0 else ():
                        interleaved.add(results, f"{load}: {figure}", kind, value)
                click.echo(f"{load}: round {number + 1} of {rounds} done", err=True)
    found = interleaved.report(machine(), results, PAIRS, rounds=rounds, streams=count, tokens=TOKENS)
    interleaved.write(found, output, Console())


def _gateways(folder: Path, options: Sequence[str], stack: ExitStack) -> dict[str, RunningServer]:
    """One of each kind, each before an engine of its own."""
    redis = stack.enter_context(running(redis_in(folder / "redis")))
    tokenizer = str(write(folder / "tokenizer"))
    found = {}
    for kind in KINDS:
        words = ("synthia_vllm.bench.null.engine", *options)
        engine = stack.enter_context(server(f"engine-{kind}", _CLIENT, words, folder))
        given = ["synthia_vllm", "gateway", "--tokenizer", tokenizer, "--upstream", engine.url]
        given += [] if kind == ALONE else ["--limits.redis", redis.url]
        given += ["--timeouts.reply-kept", "0"] if kind == LIMITS else []
        for beside in range(1 + (kind == SHARED)):
            found[kind] = stack.enter_context(server(f"{kind}-{beside}", _SERVER, tuple(given), folder))
    return found


def _asked(key: Mapping[str, str], tokens: int, *, named: bool) -> bytes:
    return streams.chat("null", tokens, headers={**key, **({"x-request-id": uuid4().hex} if named else {})})


def _measured(one: RunningServer, asked: Callable[[int], bytes], count: int, seconds: float) -> dict[str, float]:
    """Milliseconds, microseconds, tokens."""
    port = streams.port_of(one.url)
    clients = [(asked(TOKENS) for _ in streams.for_seconds(seconds, b"")) for _ in range(count)]
    before = streams.processor_seconds(one.pid)
    found = uvloop.run(streams.load(port, clients, spread=1.0))
    used = streams.processor_seconds(one.pid) - before
    single = uvloop.run(streams.load(port, [[asked(2) for _ in range(REQUESTS)]])).first
    return {
        "tokens a second": found.tokens / found.seconds,
        "processor, µs a token": 1e6 * used / found.tokens,
        "median TTFT of many, ms": 1000 * statistics.median(found.first),
        "median TTFT of one, ms": 1000 * statistics.median(single),
    }


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
