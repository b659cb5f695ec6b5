"""`synthia-vllm exporter`."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from synthia_vllm.cli.gateway import serve_before_engines
from synthia_vllm.cli.reads import EXPORTER, settings_for
from synthia_vllm.secret_urls import reveal
from synthia_vllm.settings import Settings

if TYPE_CHECKING:
    from synthia_vllm.gateway.access import Lookup


@click.command(
    "exporter",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """One page of metrics for engines that run elsewhere, without a gateway in front of them."""
    sys.exit(export(settings_for(EXPORTER, words)))


def export(settings: Settings) -> int:
    """Serves /metrics, /sd and /health until a signal; returns the exit code."""
    return serve_before_engines(settings, _serve)


async def _serve(settings: Settings, sock: socket.socket) -> int:
    from synthia_vllm.gateway.access import Access
    from synthia_vllm.gateway.app import keys_required, named
    from synthia_vllm.gateway.edge.listener import DrainingServer
    from synthia_vllm.gateway.edge.routes import Routes
    from synthia_vllm.metrics.exporter import MetricsRoutes
    from synthia_vllm.metrics.sidecar import Sidecar
    from synthia_vllm.replicas.http import own_headers

    sidecar = Sidecar(
        settings.upstream, headers=own_headers(reveal(settings.upstream_key)), wait=settings.metrics.replica_wait_s
    )
    needed = keys_required(settings)
    async with sidecar, _keys(settings, needed) as lookup:
        access = Access(None, lookup=lookup, keys_required=needed, metrics=MetricsRoutes(sidecar))
        routes = Routes(access, methods=dict.fromkeys(("/health", "/metrics", "/sd"), ("GET",)))
        app = named(routes, settings)
        host, port = sock.getsockname()[:2]

        def ready() -> None:
            click.echo(f"Ready: http://{host}:{port}/metrics of {', '.join(settings.upstream)}", err=True)

        drained = await DrainingServer(app, settings, ready).run_until_stopped(sock)
    return 0 if drained else 1


@contextlib.asynccontextmanager
async def _keys(settings: Settings, needed: bool) -> "AsyncIterator[Lookup]":
    """The look-up of keys; where none are needed, no database is opened."""
    from synthia_vllm.gateway.app import nobody
    from synthia_vllm.gateway.store.database import open_database
    from synthia_vllm.gateway.store.key_cache import KeyCache
    from synthia_vllm.gateway.store.keys import KeyStore, load_secret
    from synthia_vllm.supervise import supervise

    if not needed:
        yield nobody
        return
    database = open_database(reveal(settings.access.database))
    keys = KeyCache(KeyStore(database, load_secret(settings)), answer_s=settings.timeouts.database)
    watch = supervise("key_watch", keys.watch)
    try:
        yield keys.lookup
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        keys.close()
        database.dispose()
