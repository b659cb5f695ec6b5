"""vLLM's engine in a process of its own, and the processes that serve it: `serve --gateways N`.

What one process of Python carries, all the same, is a few ten thousand tokens a second: their text is made there, and
written. vLLM divides that by having an engine serve several clients, each with sockets of its own
(`v1/engine/core_client.py`, *client_addresses*). It numbers the clients before the engine starts, tells each once that
the engine is ready, and ends all where one of them dies. Here one that dies is replaced: the engine is nobody's child
but of the process that keeps it, and has more numbers than there are processes. Who takes a dead one's place takes the
next number, where the word that the engine is ready still waits.

What a process that died had asked for, the engine generates to its end: nobody else knows its requests by name.
"""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.private_vllm import engine_for_clients

SPARE = 16  # processes that can be replaced; each costs the engine two sockets that nobody listens on


@dataclass(frozen=True)
class Addresses:
    """Where an engine and its clients meet: sockets in a folder, two a client."""

    folder: Path
    clients: int

    def of(self, client: int) -> dict[str, str]:
        """As vLLM's client takes them; clients count from 0."""
        return {f"{way}_address": f"ipc://{self.folder}/{way}-{client}" for way in ("input", "output")}


def keep_engine(plan: EnginePlan, addresses: Addresses, needed: int) -> int:
    """Starts the engine, and keeps it until SIGTERM, or until nobody holds the other end of the pipe `needed`.

    Returns the exit code: 1 where the engine ended by itself. For a process of its own. Raises SystemExit with status 2
    for an option that vLLM has not, and what vLLM raises where the engine does not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from synthia_vllm.engine.server import parse_arguments

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_unless, args=(needed,), name="synthia-needed", daemon=True).start()
    plan.prepare_processes()
    args = AsyncEngineArgs.from_cli_args(parse_arguments(plan.arguments))
    each = [addresses.of(client) for client in range(addresses.clients)]
    try:
        engine = engine_for_clients(
            args, [one["input_address"] for one in each], [one["output_address"] for one in each]
        )
    except KeyboardInterrupt:
        return 0
    try:
        engine.monitor_engine_liveness()
    except KeyboardInterrupt:
        return 0
    finally:
        with suppress(KeyboardInterrupt):
            engine.shutdown()
    return 1


def _end_unless(needed: int) -> None:
    os.read(needed, 1)  # nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def client_of(args: Any, addresses: Addresses, client: int, engine: int) -> AsyncGenerator[Any, None]:
    """vLLM's AsyncLLM over an engine that another process keeps, from vLLM's parsed arguments.

    `engine` is a pipe whose other end that process holds: when it closes, requests end as where one's own engine dies.
    Waits for the engine.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    llm = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        disable_log_stats=engine_args.disable_log_stats,
        client_addresses=addresses.of(client),
        client_count=addresses.clients,
        client_index=client,
    )
    loop = asyncio.get_running_loop()
    loop.add_reader(engine, _gone, llm, lambda: loop.remove_reader(engine))
    try:
        yield llm
    finally:
        loop.remove_reader(engine)
        llm.shutdown()


def _gone(llm: Any, stop: Callable[[], Any]) -> None:
    """What vLLM does where it watches the engine itself (`MPClient.start_engine_core_monitor`)."""
    stop()
    llm.engine_core.resources.engine_dead = True
    llm.engine_core.shutdown()
