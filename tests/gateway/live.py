"""An app under a real uvicorn, in a thread of this process."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any

from starlette.types import ASGIApp

from synthia_vllm.gateway.edge.listener import DrainingServer
from synthia_vllm.settings import Settings


@contextmanager
def serving(
    app: ASGIApp,
    *,
    beside: AbstractAsyncContextManager[Any] | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **settings: object,
) -> Iterator[int]:
    """Yields the port. The network's limits are those of the settings; `beside` runs as long as the server does."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    ready = threading.Event()
    server = DrainingServer(app, Settings(drain_timeout=1.0, **settings), ready.set)  # type: ignore[arg-type]

    async def serve() -> None:
        async with beside or nullcontext():
            await server.serve(sockets=[sock])

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)
        sock.close()


def exchange(port: int, *parts: bytes, pause: float = 0.0, wait: float = 5.0) -> bytes:
    """Sends bytes over a socket, part by part, and reads until the other side closes or nothing comes for a while."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break  # it was closed on us, with an answer to read
            time.sleep(pause)
        connection.settimeout(wait)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
        return found
