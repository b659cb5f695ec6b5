"""What it costs a gateway that it shares its queue with another one, which can go on with its replies.

alone    limits, queue and replies are in its process
limits   limits in Redis; no other gateway is there, no reply is kept
shared   another gateway is there: one queue for both, and each reply is kept, since its client names its request

    python -m benchmarks.sharing_cost [--rounds 6] [--streams 64]

A stand-in sends tokens as fast as it can. The gateways have one core, clients, engines and Redis the other. Figures:
tokens a second and processor a token of 64 streams at once, their median time to the first token, and that of one
stream at a time.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
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

KINDS = ALONE, LIMITS, SHARED = "alone", "limits", "shared"
PAIRS = ((SHARED, LIMITS), (LIMITS, ALONE), (SHARED, ALONE))
TOKENS, REQUESTS = 300, 100
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
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        os.sched_setaffinity(0, {_CLIENT})
        redis = stack.enter_context(running(redis_in(folder / "redis")))
        tokenizer = str(write(folder / "tokenizer"))
        key = {"authorization": f"Bearer {make_key('bench', data=folder)}"}
        gateways = {}
        for kind in KINDS:
            engine = stack.enter_context(server(f"engine-{kind}", _CLIENT, ("synthia_vllm.bench.null.engine",), folder))
            words = ["synthia_vllm", "gateway", "--tokenizer", tokenizer, "--upstream", engine.url]
            words += [] if kind == ALONE else ["--limits.redis", redis.url]
            words += ["--timeouts.reply-kept", "0"] if kind == LIMITS else []
            for beside in range(1 + (kind == SHARED)):
                made = server(f"{kind}-{beside}", _SERVER, tuple(words), folder)
                gateways[kind] = stack.enter_context(made)

        def asked(kind: str, tokens: int) -> bytes:
            named = {"x-request-id": uuid4().hex} if kind == SHARED else {}
            return streams.chat("null", tokens, headers=key | named)

        def client(kind: str) -> Iterator[bytes]:
            for _ in streams.for_seconds(seconds, b""):
                yield asked(kind, TOKENS)

        for number in range(-1, rounds):  # round -1 warms up and is not counted
            for kind in interleaved.in_turn(KINDS, number):
                one = gateways[kind]
                before = streams.processor_seconds(one.pid)
                found = uvloop.run(streams.load(streams.port_of(one.url), [client(kind) for _ in range(count)]))
                used = streams.processor_seconds(one.pid) - before
                single = uvloop.run(_single(streams.port_of(one.url), [asked(kind, 2) for _ in range(REQUESTS)]))
                if number >= 0:
                    interleaved.add(results, "tokens a second", kind, found.tokens / found.seconds)
                    interleaved.add(results, "processor, µs a token", kind, 1e6 * used / found.tokens)
                    interleaved.add(results, "median TTFT of many, ms", kind, 1000 * statistics.median(found.first))
                    interleaved.add(results, "median TTFT of one, ms", kind, 1000 * single)
            click.echo(f"round {number + 1} of {rounds} done", err=True)
    found = interleaved.report(machine(), results, PAIRS, rounds=rounds, streams=count, tokens=TOKENS)
    interleaved.write(found, output, Console())


async def _single(port: int, requests: list[bytes]) -> float:
    return statistics.median((await streams.load(port, [requests])).first)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
