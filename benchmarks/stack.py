"""The full stack around a null engine, in one process: what the cost of our layers is measured on.

python -m benchmarks.stack --port 8002
"""

from typing import Any

import click
import uvloop

from benchmarks.null_engine import NullEngine
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.listener import DrainingServer, bind
from synthia_vllm.gateway.request_log import configure_logging
from synthia_vllm.settings import Settings


async def serve(port: int, engine: NullEngine, capacity: Capacity, **options: Any) -> None:
    settings = Settings(port=port, **options)
    configure_logging(settings.log)
    sock = bind(settings)
    gateway = Gateway(engine, settings, capacity=capacity)
    async with gateway:
        await DrainingServer(gateway.app, settings, lambda: None).run_until_stopped(sock)
    sock.close()


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--tokens-per-second", type=float, help="Of each stream (default: as fast as it can).")
@click.option("--prefill-s", type=float, default=0.0, show_default=True)
@click.option("--max-num-seqs", type=int)
@click.option("--max-in-flight-tokens", type=int)
def main(port: int, max_in_flight_tokens: int | None, **options: Any) -> None:
    """Serve the null engine behind all layers; settings come from the environment (SYNTHIA_…)."""
    capacity = Capacity(max_in_flight_tokens, options["max_num_seqs"])
    uvloop.run(serve(port, NullEngine(**options), capacity))


if __name__ == "__main__":
    main()
