"""What nginx and Caddy add to the first token: `python -m benchmarks.proxy`.

The snippets that `synthia-vllm deploy render systemd` gives, TLS included, in front of a gateway and a null engine.
Streams are sent in pairs, one through the proxy and one straight to the gateway, in alternating order on warm
connections; the difference is taken within a pair.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import httpx

from tests.deploy.proxies import running
from tests.running import gateway, null_engine

_BODY = {"model": "null", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "stream": True}


def first_token(client: httpx.Client) -> float:
    """Milliseconds from the request to its first chunk; the rest is read as well, so that the connection stays."""
    began = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=_BODY) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data:"))
        next(lines)
        taken = 1000 * (time.perf_counter() - began)
        for _ in lines:
            pass
    return taken


def measure(name: str, pairs: int, folder: Path) -> dict[str, float]:
    """Milliseconds added within a pair: median, the middle half's ends, 95th percentile."""
    engine = null_engine(folder / "engine.log", "--tokens-per-second", "200")
    front = gateway(folder, [engine])
    try:
        engine.start()
        front.start()
        with (
            running(name, folder, front.port) as (url, trusting),
            httpx.Client(base_url=url, verify=trusting, trust_env=False) as through,
            httpx.Client(base_url=front.url, trust_env=False) as straight,
        ):
            for client in (through, straight):
                first_token(client)
            added = []
            for number in range(pairs):
                order = (through, straight) if number % 2 else (straight, through)
                taken = {client: first_token(client) for client in order}
                added.append(taken[through] - taken[straight])
    finally:
        front.stop()
        engine.stop()
    low, median, high = statistics.quantiles(added, n=4)
    return {
        "added, median, ms": round(median, 3),
        "added, lower quarter, ms": round(low, 3),
        "added, upper quarter, ms": round(high, 3),
        "added, p95, ms": round(statistics.quantiles(added, n=20)[-1], 3),
    }


@click.command()
@click.option("--pairs", default=400, show_default=True, help="streams of each kind")
def main(pairs: int) -> None:
    """Measure and print as JSON."""
    found = {}
    for name in ("nginx", "caddy"):
        print(f"{name}: {pairs} pairs", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(name, pairs, Path(folder))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
