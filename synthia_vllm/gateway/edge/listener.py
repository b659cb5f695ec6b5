"""uvicorn around a gateway: the socket, the limits of the network's edge, the signals and the drain."""

import asyncio
import contextlib
import gc
import math
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.edge.admin_port import AdminPort
from synthia_vllm.gateway.edge.connections import ForwardedClients, connections_of
from synthia_vllm.gateway.edge.protocol import http_protocol
from synthia_vllm.gateway.edge.service_manager import ServiceManager
from synthia_vllm.settings import LOOPBACK, Settings

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it
_ARRIVING_S = 1.0  # what a new connection gets for its first request when the server ends
_LOOK_S = 0.02
_CUT_S = 2.0  # most that requests which are cut take to end


def settle_memory() -> None:
    """Takes what was loaded until now out of garbage collection: with vLLM a full one stops everybody for 0.4 s."""
    gc.collect()
    gc.freeze()


def check_exposure(settings: Settings) -> None:
    """Raises SetupError for an address that others can reach without keys, unless that is asked for."""
    if not settings.this_machine_only and settings.access.mode == "open" and not settings.insecure:
        where = f"--host {settings.host}" if settings.host not in LOOPBACK else f"--admin-host {settings.admin_host}"
        raise SetupError(
            f"{where} with --access.mode open: others could use this server without a key; "
            "leave the mode at auto and make keys with `synthia-vllm keys create`, or add "
            "--insecure if the network is yours alone"
        )


def bind(settings: Settings) -> socket.socket:
    """The listening socket, taken before the model loads so that a taken port is known at once."""
    return _bind("", settings.host, settings.port)


def bind_admin(settings: Settings) -> socket.socket | None:
    """The socket for operators, where they have one of their own."""
    if settings.admin_port is None:
        if settings.admin_host is not None:
            raise SetupError(f"--admin-host {settings.admin_host}: there is no port for it; add --admin-port")
        return None
    return _bind("admin-", settings.admin_host or settings.host, settings.admin_port)


def bind_beside(settings: Settings, ports: Sequence[int] = ()) -> list[socket.socket]:
    """Sockets for one of several processes, and the one for operators where they have their own.

    `ports` are those of the first process; it takes them from nobody: raises SetupError where somebody listens there.
    """
    if not ports:
        alone = [bind(settings), bind_admin(settings)]
        ports = [sock.getsockname()[1] for sock in alone if sock is not None]
        for sock in alone:
            if sock is not None:
                sock.close()
    hosts = (("", settings.host), ("admin-", settings.admin_host or settings.host))
    return [_bind(kind, host, port, beside=True) for (kind, host), port in zip(hosts, ports, strict=False)]


def _bind(kind: str, host: str, port: int, *, beside: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if beside:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
        if beside:
            sock.listen(_BACKLOG)  # before the process is there, which may be a while
    except OSError as error:
        sock.close()
        raise SetupError(f"--{kind}host {host} --{kind}port {port}: {error.strerror}; choose another") from None
    return sock


class DrainingServer(uvicorn.Server):
    """uvicorn that leaves the signals to us, tells when it listens, and drains before it ends.

    `admin` is a second socket, the only one that then has the routes for operators.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        on_ready: Callable[[], None],
        *,
        admin: socket.socket | None = None,
        manager: ServiceManager | None = None,
    ) -> None:
        if admin is not None:
            app = AdminPort(app, admin.getsockname()[1])
        self._admin = [] if admin is None else [admin]
        connections = connections_of(settings.access)
        config = uvicorn.Config(
            ForwardedClients(app, connections) if connections.proxies else app,
            http=http_protocol(settings.timeouts, connections),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            timeout_keep_alive=math.ceil(settings.timeouts.idle),
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
        )
        super().__init__(config)
        self._on_ready = on_ready
        self._manager = manager or ServiceManager()

    async def run_until_stopped(self, sock: socket.socket) -> bool:
        """Serves until SIGTERM or SIGINT; True after a drain, False if it was cut.

        Signals stay ours afterwards: one that comes while the last bills are written must not kill.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        await self.serve(sockets=[sock, *self._admin])
        return not self.force_exit

    def stop(self) -> None:
        """First call: accept nothing new, let running requests finish. Second: end now. Third: the next one kills."""
        if self.force_exit:
            for number in _SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._manager.stopping()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()
            self._manager.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._take_waiting(sockets or [])
        await super().shutdown(sockets)
        # uvicorn leaves what it cuts to end after us. Each request has a bill to write first.
        cut = list(self.server_state.tasks)
        for task in cut:
            if not task.cancelling():
                task.cancel()
        if cut:
            await asyncio.wait(cut, timeout=_CUT_S)

    async def _take_waiting(self, sockets: Sequence[socket.socket]) -> None:
        """Accepts what waits in the sockets and closes them at once, which resets whatever waits then.

        uvicorn's servers close theirs an event loop's turn late. What is new gets a moment to send its request.
        """
        loop = asyncio.get_running_loop()
        held = [sock.dup() for sock in sockets]
        for server in self.servers:
            server.close()
        for sock in sockets:
            sock.close()
        await asyncio.sleep(0)
        taken: list[socket.socket] = []
        for sock in held:
            sock.setblocking(False)
            with sock, contextlib.suppress(OSError):  # there are no more
                while True:
                    taken.append(sock.accept()[0])
        for connection in taken:
            await loop.connect_accepted_socket(self._protocol, connection)
        deadline = loop.time() + _ARRIVING_S
        while loop.time() < deadline and any(_is_new(one) for one in self.server_state.connections):
            if self.force_exit:
                return
            await asyncio.sleep(_LOOK_S)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def on_tick(self, counter: int) -> bool:
        self._manager.alive()
        return await super().on_tick(counter)


def _is_new(connection: Any) -> bool:
    """Whether no request has come on it yet."""
    return connection.cycle is None
