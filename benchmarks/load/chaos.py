"""`synthia-vllm bench chaos`: replicas are killed under load, and what clients saw (`benchmarks.chaos`)."""

import signal
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console


@click.command("chaos")
@click.option("--url", help="A gateway or cluster that runs, on real engines (default: null engines of our own).")
@click.option("--key", help="--url: a key for it.")
@click.option("--pids", help="--url: a command that prints the engines' pids (default: asks `cluster status`).")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="--url: kills.")
@click.option("--tokens", type=click.IntRange(1), default=150, show_default=True, help="--url: of each stream.")
@click.option("--streams", type=click.IntRange(1), help="Open at once (default: 500, --url 16).")
@click.option("--replicas", type=click.IntRange(1), default=8, show_default=True, help="Null engines.")
@click.option("--seconds", default=30.0, show_default=True, help="How long null engines are killed.")
@click.option("--every", default=5.0, show_default=True, help="Seconds between two kills of null engines.")
@click.option("--resume/--no-resume", default=True, help="What the gateway before the null engines does about it.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A run's file to add it to (default: a new one)."
)
def command(output: Path | None, streams: int | None, **options: Any) -> None:
    """Kill replicas with `kill -9` under load and check every token that clients get. Exit code 1 if a stream broke.

    Null engines are stand-ins without a model whose every token is known. With --url the engines are real: greedy
    streams, whose texts are compared with those of a run without a kill.
    """
    from benchmarks import chaos
    from benchmarks.load.records import attach, default_path

    console = Console(stderr=True, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chaos.many_files()

    def say(text: str) -> None:
        console.print(text, highlight=False)

    if options["url"]:
        name, found = "demo", chaos.demo(streams or 16, say, **{given: options[given] for given in _DEMO})
    else:
        name = "null" if options["resume"] else "null, without resume"
        found = chaos.null(streams or 500, say, tokens_per_second=5.0, **{given: options[given] for given in _NULL})
    chaos.show(name, found, Console())
    path = output or default_path("chaos")
    attach(
        path, "chaos", {"scenarios": {name: found}}, {name: value for name, value in options.items() if name != "key"}
    )
    console.print(f"written: {path}", highlight=False)
    sys.exit(1 if found["summary"]["broken streams"] else 0)


_NULL = ("replicas", "seconds", "every", "resume")
_DEMO = ("url", "key", "pids", "rounds", "tokens")
