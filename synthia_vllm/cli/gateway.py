"""`synthia-vllm gateway`."""

import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import click

from synthia_vllm.cli.reads import GATEWAY, settings_for
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings

if TYPE_CHECKING:
    from synthia_vllm.cli.gateways import Parent
    from synthia_vllm.engine.port import Capacity
    from synthia_vllm.gateway.app import Gateway
    from synthia_vllm.replicas.pool import ReplicaPool


@click.command(
    "gateway",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Keys, limits, fair sharing and the bill in front of engines that run elsewhere."""
    sys.exit(gateway(settings_for(GATEWAY, words)))


def gateway(settings: Settings) -> int:
    """Serves until a signal; returns the exit code."""
    return serve_before_engines(settings, _serve) if settings.gateways == 1 else _serve_beside(settings)


def serve_before_engines(
    settings: Settings, serve: Callable[[Settings, socket.socket], Coroutine[Any, Any, int]]
) -> int:
    """Runs what serves on a socket before engines elsewhere; returns its exit code."""
    import uvloop

    from synthia_vllm.gateway.edge.listener import bind
    from synthia_vllm.gateway.observers.log import configure_logging

    _check(settings)
    configure_logging(settings.log)
    sock = bind(settings)
    try:
        code: int = uvloop.run(serve(settings, sock))
        return code
    finally:
        sock.close()


def _check(settings: Settings) -> None:
    from synthia_vllm.gateway.edge.listener import check_exposure

    if not settings.upstream:
        raise SetupError("--upstream: name at least one engine, for instance --upstream http://127.0.0.1:8001")
    check_exposure(settings)


def _serve_beside(settings: Settings) -> int:
    """Serves with several processes."""
    import uvloop

    import synthia_vllm.gateway.app
    import synthia_vllm.replicas.pool  # noqa: F401  (once for all of them)
    from synthia_vllm.cli.gateways import Gateways, Parent, Place
    from synthia_vllm.gateway.edge.listener import bind_beside
    from synthia_vllm.gateway.observers.log import configure_logging

    _check(settings)
    check_shared(settings)
    configure_logging(settings.log)
    first = bind_beside(settings)
    ports, sockets = [sock.getsockname()[1] for sock in first], [first]

    def listen() -> list[socket.socket]:
        return sockets.pop() if sockets else bind_beside(settings, ports)

    def serve(place: Place, parent: Parent) -> int:
        configure_logging(settings.log, gateway=place.number)
        sock, admin = place.sockets[0], place.sockets[1] if len(place.sockets) > 1 else None
        code: int = uvloop.run(_serve(settings, sock, admin, parent))
        return code

    def ready() -> None:
        _tell_ready(settings, [sock.getsockname()[:2] for sock in first], f" ({settings.gateways} processes)")

    return Gateways(settings.gateways, listen, serve, ready).run()


def check_shared(settings: Settings) -> None:
    """Raises SetupError where several processes would each count for itself."""
    if settings.gateways > 1 and settings.limits.redis is None:
        raise SetupError(
            f"--gateways {settings.gateways}: each process would have limits, fair shares and metrics of its own; give "
            "them a Redis, --limits.redis redis://…, or leave it at one"
        )


def _tell_ready(settings: Settings, addresses: "Sequence[tuple[str, int]]", processes: str = "") -> None:
    host, port = addresses[0]
    click.echo(f"Ready: http://{host}:{port} in front of {', '.join(settings.upstream)}{processes}", err=True)
    for host, port in addresses[1:]:
        click.echo(f"Keys and metrics: http://{host}:{port}", err=True)


async def _serve(
    settings: Settings, sock: socket.socket, admin: socket.socket | None = None, parent: "Parent | None" = None
) -> int:
    """`parent`: whose process this is one of, and who has opened the sockets."""
    from synthia_vllm.gateway.app import Gateway
    from synthia_vllm.gateway.edge.listener import DrainingServer, bind_admin, settle_memory

    if parent is None:
        admin = bind_admin(settings)
    async with _pool(settings) as pool:
        stack = Gateway(pool, settings, replicas=pool, replica_headers=pool.headers, engines=settings.upstream)

        def ready() -> None:
            if parent is None:
                _tell_ready(settings, [each.getsockname()[:2] for each in (sock, admin) if each is not None])
            if pool.tokenizer is None:
                click.echo(
                    "Prompts go as text, and are counted by estimate until the engine tells: give --tokenizer FOLDER "
                    "for exact counts, and for streams that go on by token ids",
                    err=True,
                )

        async with stack, _sharing(stack):
            settle_memory()
            _follow(pool, stack)
            server = DrainingServer(stack.app, settings, ready, admin=admin, manager=parent)
            if parent is not None:
                parent.when_gone(server.stop)
            drained = await server.run_until_stopped(sock)
    return 0 if drained else 1


@contextlib.asynccontextmanager
async def _sharing(stack: "Gateway") -> AsyncIterator[None]:
    """Shares the queue with other gateways before the same engines, through Redis; or divides the room, as set.

    Raises SetupError where it is neither, and another one is there all the same.
    """
    from synthia_vllm.gateway.fair.peers import claim, identity

    settings, number = stack.settings, stack.settings.fair.gateways
    stack.set_gateways(number or 1)
    if settings.limits.redis is None:
        claimed = [] if number else claim(settings.upstream)
        try:
            yield
        finally:
            for name in claimed:
                name.close()
        return
    async with stack.sharing([identity(url) for url in settings.upstream]):
        yield


def _pool(settings: Settings) -> "ReplicaPool":
    from synthia_vllm.engine.tokenizer import Tokenizer
    from synthia_vllm.replicas.pool import ReplicaPool
    from synthia_vllm.secret_urls import reveal

    replicas = settings.replicas
    if "start_wait_s" not in replicas.model_fields_set:
        replicas = replicas.model_copy(update={"start_wait_s": settings.fair.max_wait_s})
    return ReplicaPool(
        replicas,
        tokenizer=Tokenizer.load(settings.tokenizer) if settings.tokenizer else None,
        context=settings.engine.max_model_len,
        key=reveal(settings.upstream_key),
        connect_timeout=settings.timeouts.upstream_connect,
        silence_s=settings.timeouts.upstream_read,
        resume=settings.resume,
    )


def _follow(pool: "ReplicaPool", stack: "Gateway") -> None:
    """Keeps the room for requests in line with what the engines tell; they may start after the gateway."""
    from synthia_vllm.metrics.replicas import engine_name

    told = stack.settings.fair.max_in_flight_tokens is not None

    def follow(capacity: "Capacity") -> None:
        nonlocal told
        if not told and capacity.tokens is None and capacity.requests is not None:
            told = True
            click.echo(
                "The engine tells no KV cache size, so nothing queues here by its tokens: set "
                "--fair.max-in-flight-tokens",
                err=True,
            )
        stack.set_capacity(capacity)

    pool.on_capacity = follow
    pool.update({engine_name(url): url for url in stack.settings.upstream})
