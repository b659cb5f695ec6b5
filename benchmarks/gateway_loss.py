r"""320 streams of a real engine, the gateway of half of them killed with -9; and a Redis that restarts empty.

    synthia-vllm serve --port 8000 --engine.dtype float32 --engine.max-model-len 2048 -- \
        --max-num-seqs 320 --max-num-batched-tokens 640
    python -m benchmarks.gateway_loss --upstream http://127.0.0.1:8000 --tokenizer FOLDER [--streams 320]

Two gateways with one Redis; clients come back as `synthia_vllm.client` does. In float32 the texts are those of a run
that nothing disturbs. Figures: replies that failed or say something else, tokens billed / tokens that clients counted,
the pause of the streams that were met, and what any gap between two events is, in seconds.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.soak_stores import Store, redis_in, running
from synthia_vllm import __version__
from synthia_vllm.bench.gateway_loss import Read, billed, figures, read_all
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.processes import Launched, launch

_RESULTS = Path(__file__).with_name("results") / "gateway_loss.json"
_BILLED_S = 5.0
_FEW = 5
SCENARIOS = UNDISTURBED, KILLED, RESTARTED = "undisturbed", "gateway killed", "Redis restarted"


@click.command()
@click.option("--upstream", required=True)
@click.option("--tokenizer", required=True)
@click.option("--streams", default=320, show_default=True)
@click.option("--tokens", default=60, show_default=True, help="Of each.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=_RESULTS, show_default=False)
def main(upstream: str, tokenizer: str, streams: int, tokens: int, output: Path) -> None:
    """Kill a gateway, and restart Redis, under streams whose clients come back."""
    prompts = [f"Question {number}: what is an orca?" for number in range(streams)]
    scenarios: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(running(redis_in(folder / "redis")))
        words = [sys.executable, "-m", "synthia_vllm", "gateway", "--access.mode", "keys", "--no-log.requests"]
        words += ["--fair.max-wait-s", "600"]  # all of them are to run
        words += ["--upstream", upstream, "--tokenizer", tokenizer, "--limits.redis", redis.url]
        fleet = Fleet(redis, words, folder)
        stack.callback(fleet.kill)
        key = make_key("alice", data=folder)
        texts: list[str] = []
        for scenario in SCENARIOS:
            fleet.complete()
            before, fleet.moments = billed(folder)[1], []
            disturb = partial(fleet.disturb, scenario)
            found = asyncio.run(read_all(fleet.urls, prompts, tokens, key=key, meanwhile=disturb))
            texts = texts or [one.text for one in found]
            time.sleep(_BILLED_S)
            told: dict[str, Any] = figures(texts, found, tokens, fleet.moments)
            told["billed / counted by clients"] = (billed(folder)[1] - before) / max(1, int(told["tokens"]))
            scenarios[scenario] = told
            click.echo(f"{scenario}: {json.dumps(told)}")
    report = {"machine": machine(), "version": __version__, "streams": streams, "tokens": tokens}
    output.write_text(json.dumps(report | {"scenarios": scenarios}, indent=1) + "\n")


class Fleet:
    """Two gateways before the engine, and what happens to them."""

    def __init__(self, redis: Store, words: Sequence[str], folder: Path) -> None:
        self._redis = redis
        self._words = words
        self._folder = folder
        self._started = 0
        self.gateways: list[Launched] = []
        self.moments: list[float] = []

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self.gateways]

    def complete(self) -> None:
        """Starts what is missing, and waits for all."""
        self.gateways = [one for one in self.gateways if one.process.poll() is None]
        while len(self.gateways) < 2:
            self._started += 1
            self.gateways.append(launch(f"gateway-{self._started}", self._words, {}, self._folder, health="/ready"))
        while not all(one.look() for one in self.gateways):
            time.sleep(0.2)

    def kill(self) -> None:
        for one in self.gateways:
            one.process.kill()

    async def disturb(self, scenario: str, replies: Sequence[Read]) -> None:
        """When each stream has a few tokens."""
        while scenario != UNDISTURBED and min(len(one.at) for one in replies if not one.error) < _FEW:
            await asyncio.sleep(0.1)
        if scenario == KILLED:
            self.moments.append(time.monotonic())
            self.gateways[0].process.kill()
        elif scenario == RESTARTED:
            self.moments.append(time.monotonic())
            await asyncio.to_thread(self._redis.stop)
            await asyncio.to_thread(self._redis.start)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
