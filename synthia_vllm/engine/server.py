"""One machine: vLLM's engine and its own FastAPI app, behind our layers, in one process.

The private part of vLLM that this needs is found by `vllm_seams`; so are the versions it was checked on.
"""

import asyncio
import contextlib
import inspect
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any

from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.tokens import bos_lead, token_counter
from synthia_vllm.engine.vllm_seams import find
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.listener import DrainingServer
from synthia_vllm.settings import Settings

_ENGINE_POLL_S = 0.5


def run(settings: Settings, plan: EnginePlan, sock: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit code: 0 after a drain, 1 if the engine died or was cut."""
    import uvloop

    plan.apply_environment()
    code: int = uvloop.run(_serve(settings, plan, sock, on_ready))
    return code


async def _serve(settings: Settings, plan: EnginePlan, sock: socket.socket, on_ready: Callable[[], None]) -> int:
    async with engine_app(parse_arguments(plan.arguments)) as (engine, app):
        gateway = Gateway(
            app,
            settings,
            capacity=_capacity(engine, settings),
            count=token_counter(await _tokenizer(engine)),
            context=engine.model_config.max_model_len,
        )
        async with gateway:
            server = DrainingServer(gateway.app, settings, on_ready)
            app.state.server = server  # vLLM's error handlers stop the server through it when the engine is dead
            await warm_up(engine)
            watch = asyncio.create_task(_watch_engine(engine, server))
            try:
                drained = await server.run_until_stopped(sock)
                code = 0 if drained and not engine.errored else 1
            finally:
                watch.cancel()
    return code


@contextlib.asynccontextmanager
async def engine_app(args: Any) -> AsyncGenerator[tuple[Any, Any], None]:
    """A running engine and vLLM's FastAPI app over it, from vLLM's parsed arguments. Ends the engine's processes."""
    build_app, init_app_state = find("build_app"), find("init_app_state")
    async with find("build_async_engine_client")(args) as engine:
        tasks = await engine.get_supported_tasks()
        template = {"bos_lead": bos_lead(await _tokenizer(engine))}
        args.default_chat_template_kwargs = template | (args.default_chat_template_kwargs or {})
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        yield engine, app


def parse_arguments(arguments: list[str]) -> Any:
    """vLLM's own parser over a command line. Exits with status 2 and vLLM's message for an option it has not."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="synthia-vllm serve -- (vLLM's options)")
    args = find("make_arg_parser")(parser).parse_args(arguments)
    find("validate_parsed_serve_args")(args)
    return args


def _capacity(engine: Any, settings: Settings) -> Capacity:
    """What the engine holds at once, by its own figures; a setting wins."""
    cache, scheduler = engine.vllm_config.cache_config, engine.vllm_config.scheduler_config
    return Capacity(
        tokens=settings.fair.max_in_flight_tokens or cache.num_gpu_blocks * cache.block_size,
        requests=settings.fair.max_in_flight_requests or scheduler.max_num_seqs,
        block=cache.block_size,
    )


async def _tokenizer(engine: Any) -> Any:
    found = engine.get_tokenizer()
    return await found if inspect.isawaitable(found) else found


async def warm_up(engine: Any) -> None:
    """Generates two tokens: the first request of a new engine pays for kernels that are built on first use."""
    from vllm import SamplingParams

    async for _ in engine.generate([1], SamplingParams(max_tokens=2, top_k=50), "synthia-warm-up"):
        pass


async def _watch_engine(engine: Any, server: DrainingServer) -> None:
    """Ends the server when its engine has died: nothing can be answered any more."""
    while not engine.errored:
        await asyncio.sleep(_ENGINE_POLL_S)
    server.force_exit = True
    server.should_exit = True
