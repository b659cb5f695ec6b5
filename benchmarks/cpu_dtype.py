"""What a number's type costs on this CPU: `serve` with the demo model in float32 and in bfloat16.

    python -m benchmarks.cpu_dtype [--rounds 3] [--output benchmarks/results/cpu_dtype.json]

Each is started once; they take turns. `serve` takes float32 by itself where the CPU lacks AVX-512 (`engine.arguments`).
"""

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from benchmarks.start import SERVE, tokens_per_second
from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.processes import running
from synthia_vllm.engine.hardware import computes_in_half_precision

_TYPES = ("float32", "bfloat16")
_STREAMS = (1, 8, 64)
_SECONDS = 10


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--output", default=Path("benchmarks/results/cpu_dtype.json"), type=click.Path(path_type=Path))
def main(rounds: int, output: Path) -> None:
    """Loads both in turn, and writes what it has after every round."""
    console = Console()
    results: interleaved.Results = {}
    with tempfile.TemporaryDirectory(prefix="synthia-dtype-") as folder, ExitStack() as stack:
        command = [*SERVE, "--engine.kv-cache-gib", "1", "--engine.dtype"]
        servers = {
            name: stack.enter_context(running(name, [*command, name], {}, Path(folder), health="/ready"))
            for name in _TYPES
        }
        for number in range(rounds):
            for name in interleaved.in_turn(list(_TYPES), number):
                for streams in _STREAMS:
                    speed = asyncio.run(tokens_per_second(servers[name].url, streams, _SECONDS))
                    interleaved.add(results, f"tokens/s, streams: {streams}", name, speed)
                    console.print(f"round {number + 1} of {rounds}: {name}, {streams}: {speed:.1f} tokens/s")
            where = machine() | {"AVX-512": computes_in_half_precision()}
            report = interleaved.report(where, results, [_TYPES], rounds=number + 1)
            interleaved.write(report, output, console)


if __name__ == "__main__":
    main()
