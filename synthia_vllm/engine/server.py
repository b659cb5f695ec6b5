"""One machine: vLLM's engine and its own FastAPI app, behind our layers, in one process.

The private part of vLLM that this needs (`build_async_engine_client`, `build_app`, `init_app_state`, the argument
parser) was checked on 0.29.0; `tests/engine/test_vllm_seams.py` fails when it moves.
"""

import asyncio
import contextlib
import inspect
import math
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import uvicorn

from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.tokens import bos_lead
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.app import build_gateway
from synthia_vllm.settings import Settings

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Headers of one request, in bytes. Enough for any client; a megabyte of headers is refused by the HTTP parser.
_MAX_HEADER_BYTES = 64 * 1024
_ENGINE_POLL_S = 0.5


def check_exposure(settings: Settings) -> None:
    """Raises SetupError for an address that others can reach without keys, unless that is asked for."""
    if settings.host not in _LOOPBACK and not settings.insecure:
        raise SetupError(
            f"--host {settings.host}: others could reach this server, and there are no keys; "
            "listen on 127.0.0.1, or add --insecure if the network is yours alone"
        )


def bind(settings: Settings) -> socket.socket:
    """The listening socket, taken before the model loads so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        raise SetupError(f"--host {settings.host} --port {settings.port}: {error.strerror}; choose another") from None
    return sock


def run(settings: Settings, plan: EnginePlan, sock: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit code: 0 after a drain, 1 if the engine died or was cut."""
    import uvloop

    plan.apply_environment()
    code: int = uvloop.run(_serve(settings, plan, sock, on_ready))
    return code


async def _serve(settings: Settings, plan: EnginePlan, sock: socket.socket, on_ready: Callable[[], None]) -> int:
    async with engine_app(parse_arguments(plan.arguments)) as (engine, app):
        server = DrainingServer(
            uvicorn.Config(
                build_gateway(app, settings),
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            ),
            on_ready,
        )
        app.state.server = server  # vLLM's error handlers stop the server through it when the engine is dead
        await _warm_up(engine)
        watch = asyncio.create_task(_watch_engine(engine, server))
        try:
            with _signals(server):
                await server.serve(sockets=[sock])
        finally:
            watch.cancel()
    return 1 if server.force_exit or server.engine_died else 0


@contextlib.asynccontextmanager
async def engine_app(args: Any) -> AsyncGenerator[tuple[Any, Any], None]:
    """A running engine and vLLM's FastAPI app over it, from vLLM's parsed arguments. Ends the engine's processes."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        template = {"bos_lead": bos_lead(await _tokenizer(engine))}
        args.default_chat_template_kwargs = template | (args.default_chat_template_kwargs or {})
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        yield engine, app


async def _tokenizer(engine: Any) -> Any:
    found = engine.get_tokenizer()
    return await found if inspect.isawaitable(found) else found


async def _warm_up(engine: Any) -> None:
    """Generates two tokens: the first request of a new engine pays for kernels that are built on first use."""
    from vllm import SamplingParams

    async for _ in engine.generate([1], SamplingParams(max_tokens=2, top_k=50), "synthia-warm-up"):
        pass


def parse_arguments(arguments: list[str]) -> Any:
    """vLLM's own parser over a command line. Exits with status 2 and vLLM's message for an option it has not."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser(prog="synthia-vllm serve -- (vLLM's options)")).parse_args(arguments)
    validate_parsed_serve_args(args)
    return args


class DrainingServer(uvicorn.Server):
    """uvicorn that leaves the signals to us and tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.engine_died = False
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def stop(self) -> None:
        """First call: accept nothing new, let running requests finish. Second: end now."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


@contextlib.contextmanager
def _signals(server: DrainingServer) -> Generator[None, None, None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _watch_engine(engine: Any, server: DrainingServer) -> None:
    """Ends the server when its engine has died: nothing can be answered any more."""
    while not engine.errored:
        await asyncio.sleep(_ENGINE_POLL_S)
    server.engine_died = True
    server.force_exit = True
    server.should_exit = True
