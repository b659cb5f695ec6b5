"""One machine: vLLM's engine in this process, behind our layers."""

import asyncio
import contextlib
import inspect
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any

from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.local import LocalEngine
from synthia_vllm.engine.private_vllm import find
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.listener import DrainingServer, settle_memory
from synthia_vllm.settings import Settings
from synthia_vllm.supervise import supervise

_ENGINE_POLL_S = 0.5

# Something that is to run over vLLM's engine as long as the server does, given AsyncLLM and vLLM's parsed arguments.
Companion = Callable[[Any, Any], contextlib.AbstractAsyncContextManager[None]]


def run(
    settings: Settings,
    plan: EnginePlan,
    sock: socket.socket,
    on_ready: Callable[[], None],
    companion: Companion | None = None,
    *,
    admin: socket.socket | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit code: 0 after a drain, 1 if the engine died or was cut."""
    plan.prepare_processes()
    import uvloop

    code: int = uvloop.run(_serve(settings, plan, sock, on_ready, companion, admin))
    return code


async def _serve(
    settings: Settings,
    plan: EnginePlan,
    sock: socket.socket,
    on_ready: Callable[[], None],
    companion: Companion | None,
    admin: socket.socket | None,
) -> int:
    args = parse_arguments(plan.arguments)
    async with running_engine(args) as llm, contextlib.AsyncExitStack() as beside:
        engine = await local_engine(llm, args)
        gateway = await beside.enter_async_context(Gateway(engine, settings, capacity=engine.capacity()))
        server = DrainingServer(gateway.app, settings, on_ready, admin=admin)
        await warm_up(llm)
        if companion is not None:
            await beside.enter_async_context(companion(llm, args))
        return await serve_until_stopped(server, sock, llm)


async def serve_until_stopped(server: DrainingServer, sock: socket.socket, llm: Any) -> int:
    """Until a signal, or until the engine has died; returns the exit code."""
    settle_memory()
    watch = supervise("engine_watch", lambda: _watch_engine(llm, server))
    try:
        drained = await server.run_until_stopped(sock)
        return 0 if drained and not llm.errored else 1
    finally:
        watch.cancel()


@contextlib.asynccontextmanager
async def running_engine(args: Any) -> AsyncGenerator[Any, None]:
    """vLLM's AsyncLLM from vLLM's parsed arguments. Ends the engine's processes."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args), usage_context=UsageContext.OPENAI_API_SERVER)
    try:
        yield llm
    finally:
        llm.shutdown()


async def local_engine(llm: Any, args: Any) -> LocalEngine:
    """The port over a running AsyncLLM, under the names that vLLM was told."""
    tokenizer = await tokenizer_of(llm)
    # vLLM lets a token through that is one too high, and the worker ends on it.
    tokenizer.size = min(tokenizer.size, llm.model_config.get_vocab_size())
    return LocalEngine(llm, tokenizer, args.served_model_name or [args.model])


async def tokenizer_of(llm: Any) -> Tokenizer:
    """A copy of a running engine's tokenizer."""
    found = llm.get_tokenizer()
    return Tokenizer.of(await found if inspect.isawaitable(found) else found)


def parse_arguments(arguments: list[str]) -> Any:
    """vLLM's own parser over a command line. Exits with status 2 and vLLM's message for an option it has not."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="synthia-vllm serve -- (vLLM's options)")
    args = find("make_arg_parser")(parser).parse_args(arguments)
    find("validate_parsed_serve_args")(args)
    return args


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
