"""`synthia-vllm serve --gateways N`: a process that keeps the engine, and N that serve it on one port."""

import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from synthia_vllm.cli.gateway import check_shared
from synthia_vllm.cli.gateways import Gateways, Parent, Place
from synthia_vllm.cli.serve import engine_failed, log_path, ready_text
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings

_END_S = 30.0  # that an engine gets to end
_LOOK_S = 0.05
_NO_SUCH_OPTION = 2  # vLLM's exit code for an option that it has not


def serve_several(settings: Settings, vllm_options: list[str]) -> int:
    """Starts, serves, drains; returns the exit code. Raises SetupError where the engine does not start."""
    from synthia_vllm.engine.arguments import preload_once
    from synthia_vllm.engine.hardware import inspect_machine

    check_shared(settings)
    preload_once(inspect_machine())
    with tempfile.TemporaryDirectory(prefix="synthia-serve-") as name:
        counts = Path(name) / "counts"
        counts.mkdir()
        # Before prometheus_client is there: what the processes count with vLLM's metrics is then in files.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counts)
        return _serve(settings, vllm_options, Path(name))


def _serve(settings: Settings, vllm_options: list[str], folder: Path) -> int:
    from synthia_vllm.engine.arguments import plan_engine
    from synthia_vllm.engine.hardware import inspect_machine
    from synthia_vllm.engine.private_vllm import installed_vllm, serves_several
    from synthia_vllm.engine.shared_engine import SPARE, Addresses, client_of, keep_engine
    from synthia_vllm.engine.startup import Startup, output_to
    from synthia_vllm.gateway.app import check_stores
    from synthia_vllm.gateway.edge.listener import bind_beside, check_exposure
    from synthia_vllm.gateway.observers.log import configure_logging

    if not serves_several():
        raise SetupError(
            f"--gateways {settings.gateways}: needs vLLM 0.29, this is {installed_vllm()}; leave it at one"
        )
    check_exposure(settings)
    check_stores(settings)
    first = bind_beside(settings)
    ports, sockets = [sock.getsockname()[1] for sock in first], [first]
    plan = plan_engine(settings, inspect_machine(), vllm_options)
    log = log_path(settings, ports[0])
    addresses = Addresses(folder, settings.gateways + SPARE)
    ready = False

    def listen() -> list[socket.socket]:
        return sockets.pop() if sockets else bind_beside(settings, ports)

    def serve(place: Place, parent: Parent) -> int:
        import uvloop

        configure_logging(settings.log, gateway=place.number)
        plan.apply_environment()
        client = partial(client_of, addresses=addresses, client=place.process - 1, engine=keeper.lives)
        code: int = uvloop.run(_serve_one(settings, plan.arguments, client, place, parent))
        return code

    def tell_ready() -> None:
        nonlocal ready
        ready = True
        admin = first[1] if len(first) > 1 else None
        text = ready_text(settings, ports[0], plan.name, startup.stop(), log, admin)
        console.print(f"{settings.gateways} processes. {text}", highlight=False, markup=False)

    def look() -> bool:
        if not ready:
            startup.look()
        return keeper.ended

    with output_to(log) as terminal:
        configure_logging(settings.log)
        console = Console(file=terminal, soft_wrap=True)
        if plan.profile:
            console.print(f"profile {plan.profile}", highlight=False, markup=False)
        startup = Startup(console, log)
        keeper = Keeper(lambda needed: keep_engine(plan, addresses, needed), first)
        try:
            code = Gateways(settings.gateways, listen, serve, tell_ready, most=addresses.clients, look=look).run()
        finally:
            keeper.close()
        if ready or not keeper.failed:
            return code
        return _told_failure(keeper, log, console)


async def _serve_one(
    settings: Settings,
    arguments: list[str],
    client: Callable[[Any], AbstractAsyncContextManager[Any]],
    place: Place,
    parent: Parent,
) -> int:
    """One of the processes. `client` makes vLLM's AsyncLLM of vLLM's parsed arguments."""
    from synthia_vllm.engine.server import local_engine, parse_arguments, serve_until_stopped, warm_up
    from synthia_vllm.gateway.app import Gateway
    from synthia_vllm.gateway.edge.listener import DrainingServer
    from synthia_vllm.gateway.fair.peers import identity

    sock, admin = place.sockets[0], place.sockets[1] if len(place.sockets) > 1 else None
    args = parse_arguments(arguments)
    own = f"http://127.0.0.1:{sock.getsockname()[1]}"  # what the processes call the engine that they share
    async with client(args) as llm:
        engine = await local_engine(llm, args)
        gateway = Gateway(engine, settings, capacity=engine.capacity(), engines=[own])
        gateway.set_gateways(settings.gateways)  # until they know of each other
        async with gateway, gateway.sharing([identity(own)]):
            server = DrainingServer(gateway.app, settings, lambda: None, admin=admin, manager=parent)
            parent.when_gone(server.stop)
            await warm_up(llm)
            return await serve_until_stopped(server, sock, llm)


def _told_failure(keeper: "Keeper", log: Path | None, console: Console) -> int:
    """As `serve` has it: raises SetupError, and where vLLM did not like an option, prints what it said."""
    if log is not None and keeper.code == _NO_SUCH_OPTION:
        console.print(log.read_text(errors="replace"), highlight=False, markup=False)
        return keeper.code
    raise engine_failed(log, f"exit code {keeper.code}")


class Keeper:
    """The process that keeps the engine. It ends after the last process that was forked from this one, and this one."""

    def __init__(self, keep: Callable[[int], int], sockets: Iterable[socket.socket]) -> None:
        """`keep` returns its exit code, given a pipe that closes when nobody needs the engine any more.

        The sockets are not for it: it would keep connections that nobody accepts.
        """
        needed, self._needs = os.pipe()
        self.lives, self_lives = os.pipe()  # nothing comes of the first but its end, with the process
        self.failed = False
        self.code: int | None = None
        self._pid = os.fork()
        if not self._pid:
            for pipe in (self._needs, self.lives):
                os.close(pipe)
            for sock in sockets:
                sock.close()
            _be(keep, needed)
        for pipe in (needed, self_lives):
            os.close(pipe)

    @property
    def ended(self) -> bool:
        """Whether it did by itself."""
        if self.code is None:
            self.failed = self._wait()
        return self.failed

    def close(self) -> None:
        """Has it end the engine."""
        os.close(self._needs)
        deadline = time.monotonic() + _END_S
        while self.code is None and not self._wait():
            if time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            time.sleep(_LOOK_S)
        os.close(self.lives)

    def _wait(self) -> bool:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        return bool(pid)


def _be(keep: Callable[[int], int], needed: int) -> NoReturn:
    """In the new process."""
    code = 1
    try:
        os.setpgid(0, 0)  # a terminal's Ctrl-C is for the parent
        code = keep(needed)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
