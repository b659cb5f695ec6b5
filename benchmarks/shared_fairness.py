"""Four gateways on one queue, one killed every 30 s, under 200 users who always want more: is it still fair?

python -m benchmarks.shared_fairness [--seconds 300] [--users 200] [--every 30]
"""

import asyncio
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.shared_gateways import PROMPT, TOKENS, Load, fleet
from synthia_vllm import __version__
from synthia_vllm.bench.machine import machine

_RESULTS = Path(__file__).with_name("results") / "shared_fairness.json"
_WARM_S = 10.0


@click.command()
@click.option("--seconds", default=300.0, show_default=True)
@click.option("--users", default=200, show_default=True)
@click.option("--streams", default=4, show_default=True, help="Of each user, one at each gateway.")
@click.option("--every", default=30.0, show_default=True, help="Seconds from one kill to the next.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=_RESULTS, show_default=False)
def main(seconds: float, users: int, streams: int, every: float, output: Path) -> None:
    """Measure the gap in service between users, and by how much the gateways fill more than the engines hold."""
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder), users) as gateways:
        load = Load(gateways, streams)
        kills = asyncio.run(load.run(seconds, _WARM_S, every))
    bound = 2 * max(1.0 * PROMPT, 2.0 * TOKENS)  # theorem 4.4, of one gateway
    options = {"seconds": seconds, "users": users, "streams": streams, "gateways": 4, "engines hold, tokens": TOKENS}
    summary: dict[str, Any] = {
        "gap in service between two users": load.gap,
        "of one gateway's bound": round(load.gap / bound, 3),
        "service of a user, mean": round(sum(load.service.values()) / users),
        "most tokens in flight, of what the engines hold": round(load.most / TOKENS, 3),
        "replies": load.replies,
        "lost with a gateway, or found none": load.lost,
        "refused": dict(load.refused.most_common(5)),
    }
    report = {"machine": machine(), "version": __version__, "options": options, "kills": kills, "summary": summary}
    output.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in summary.items():
        Console().print(f"{name}: {value}", highlight=False)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
