"""The full stack over a stand-in engine, in one process: what the cost of our layers is measured on.

python -m synthia_vllm.bench.stack --port 8002 [--tokens-per-second 20]
"""

from contextlib import suppress

import click
import uvloop

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.listener import DrainingServer, bind
from synthia_vllm.gateway.observers.log import configure_logging
from synthia_vllm.settings import Settings


async def serve(settings: Settings, engine: NullEnginePort, capacity: Capacity) -> None:
    """Until a signal."""
    configure_logging(settings.log)
    sock = bind(settings)
    async with Gateway(engine, settings, capacity=capacity) as gateway:
        await DrainingServer(gateway.app, settings, lambda: None).run_until_stopped(sock)
    sock.close()


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
@click.option("--tokens-per-second", type=float, help="Of each stream (default: as fast as it can).")
@click.option("--prefill-s", type=float, default=0.0, show_default=True, help="Before the first token.")
@click.option("--max-num-seqs", type=int, help="Sequences at once (default: all).")
@click.option("--max-in-flight-tokens", type=int, help="Of all requests together (default: no bound).")
def main(
    host: str,
    port: int,
    tokens_per_second: float | None,
    prefill_s: float,
    max_num_seqs: int | None,
    max_in_flight_tokens: int | None,
) -> None:
    """Serve the null engine's port behind all layers; settings come from the environment (SYNTHIA_…)."""
    engine = NullEnginePort(
        context=None, tokens_per_second=tokens_per_second, prefill_s=prefill_s, max_num_seqs=max_num_seqs
    )
    capacity = Capacity(max_in_flight_tokens, max_num_seqs)
    uvloop.run(serve(Settings(host=host, port=port), engine, capacity))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
