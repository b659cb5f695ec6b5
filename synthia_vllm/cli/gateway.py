"""`synthia-vllm gateway`."""

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings, load_settings

if TYPE_CHECKING:
    from synthia_vllm.gateway.app import Gateway
    from synthia_vllm.replicas.pool import ReplicaPool
    from synthia_vllm.replicas.upstreams import Upstreams

_ASK_AGAIN_S = 10.0
PROG = "synthia-vllm gateway"


@click.command(
    "gateway",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Keys, limits, fair sharing and the bill in front of engines that run elsewhere."""
    sys.exit(gateway(load_settings(words, prog=PROG)))


def gateway(settings: Settings) -> int:
    """Serves until a signal; returns the exit code."""
    return serve_before_engines(settings, _serve)


def serve_before_engines(
    settings: Settings, serve: Callable[[Settings, socket.socket], Coroutine[Any, Any, int]]
) -> int:
    """Runs what serves on a socket before engines elsewhere; returns its exit code."""
    import uvloop

    from synthia_vllm.gateway.edge.listener import bind, check_exposure
    from synthia_vllm.gateway.observers.log import configure_logging

    if not settings.upstream:
        raise SetupError("--upstream: name at least one engine, for instance --upstream http://127.0.0.1:8001")
    check_exposure(settings)
    configure_logging(settings.log)
    sock = bind(settings)
    try:
        code: int = uvloop.run(serve(settings, sock))
        return code
    finally:
        sock.close()


async def _serve(settings: Settings, sock: socket.socket) -> int:
    from synthia_vllm.gateway.app import Gateway
    from synthia_vllm.gateway.edge.listener import DrainingServer, settle_memory

    upstream = _upstream(settings)
    async with upstream:
        stack = Gateway(upstream, settings, replicas=upstream, replica_headers=upstream.headers)
        host, port = sock.getsockname()[:2]

        def ready() -> None:
            click.echo(f"Ready: http://{host}:{port} in front of {', '.join(settings.upstream)}", err=True)
            if upstream.tokenizer is None:
                click.echo(
                    "Prompts go as text, and are counted by estimate until the engine tells: give --tokenizer FOLDER "
                    "for exact counts, and for streams that go on by token ids",
                    err=True,
                )

        async with stack:
            settle_memory()
            following = asyncio.create_task(_follow_capacity(upstream, stack))
            try:
                drained = await DrainingServer(stack.app, settings, ready).run_until_stopped(sock)
            finally:
                following.cancel()
    return 0 if drained else 1


def _upstream(settings: Settings) -> "Upstreams | ReplicaPool":
    from synthia_vllm.engine.tokenizer import Tokenizer
    from synthia_vllm.replicas.pool import ReplicaPool
    from synthia_vllm.replicas.upstreams import Upstreams

    tokenizer = Tokenizer.load(settings.tokenizer) if settings.tokenizer else None
    key = settings.upstream_key.get_secret_value() if settings.upstream_key else None
    connect, read = settings.timeouts.upstream_connect, settings.timeouts.upstream_read
    context = settings.engine.max_model_len
    if settings.resume:
        return ReplicaPool(
            settings.cluster,
            tokenizer=tokenizer,
            context=context,
            key=key,
            connect_timeout=connect,
        )
    return Upstreams(
        settings.upstream, tokenizer=tokenizer, context=context, key=key, connect_timeout=connect, read_timeout=read
    )


async def _follow_capacity(upstream: "Upstreams | ReplicaPool", stack: "Gateway") -> None:
    """Keeps the room for requests in line with what the engines tell; they may start after the gateway."""
    from synthia_vllm.metrics.replicas import engine_name
    from synthia_vllm.replicas.upstreams import Upstreams

    if not isinstance(upstream, Upstreams):
        upstream.on_capacity = stack.set_capacity
        upstream.update({engine_name(url): url for url in stack.settings.upstream})
        return
    told = False
    while (capacity := await upstream.capacity()) is None or capacity.tokens is None:
        if not told and stack.settings.fair.max_in_flight_tokens is None:
            click.echo(
                "The engine tells no KV cache size (yet), so nothing queues here: set --fair.max-in-flight-tokens",
                err=True,
            )
        told = True
        await asyncio.sleep(_ASK_AGAIN_S)
    stack.set_capacity(capacity)
