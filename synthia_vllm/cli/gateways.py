"""`--gateways N` of `gateway` and `serve`: processes on one port, started, replaced and drained by their parent.

Each has a listening socket of its own on that port (SO_REUSEPORT), among which Linux divides new connections evenly. Of
one socket for all, the process that happens to wake first takes all that wait: the same one again and again. The parent
holds every socket too, so connections that wait for a process that dies are not reset: the one in its place takes them.
"""

import asyncio
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import click
import structlog

from synthia_vllm.errors import SynthiaError
from synthia_vllm.gateway.edge.service_manager import ServiceManager

_LOOK_S = 0.1
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 30.0
_STEADY_S = 30.0  # one that has run for so long is replaced at once
_PATIENCE_S = 1.0  # for a longer pause nobody is to wait: its socket is closed meanwhile
_HUNG_S = 60.0  # as long as systemd's watchdog in our unit
_BEAT_S = 1.0

_log = structlog.get_logger(__name__)


class Parent(ServiceManager):
    """What a gateway process tells its parent: that it is ready, that its event loop runs, and that it drains."""

    def __init__(self, told: int, alive: int) -> None:
        super().__init__({})
        self._alive = alive  # nothing comes from it but its end, when the parent ends
        self._told_to = told
        self._beat = 0.0
        os.set_blocking(told, False)

    def when_gone(self, stop: Callable[[], None]) -> None:
        """Has the running event loop call this when the parent was killed: nobody else would ever stop this process."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(self._alive)
            stop()

        loop.add_reader(self._alive, gone)

    def ready(self) -> None:
        self._tell(b"r")

    def stopping(self) -> None:
        self._tell(b"s")

    def alive(self) -> None:
        if time.monotonic() - self._beat >= _BEAT_S:
            self._beat = time.monotonic()
            self._tell(b".")

    def _tell(self, word: bytes) -> None:
        try:
            os.write(self._told_to, word)
        except OSError:  # it is gone, or busy for a minute
            return


@dataclass(eq=False)
class Place:
    """A place for one process. `sockets` are those it listens on."""

    number: int
    sockets: list[socket.socket]
    process: int = 0  # of all that were ever started, from 1
    pid: int = 0
    ready: bool = False
    drains: bool = False  # and no longer says that it is alive
    pause: float = _FIRST_PAUSE_S
    began: float = 0.0
    told: float = 0.0  # when it last said that it is alive
    again_at: float = 0.0
    pipes: tuple[int, ...] = field(default=())  # what it tells, and what tells it that its parent is alive

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets = []


class Gateways:
    """The parent. It serves nothing, and has no event loop and no threads, so that it can fork.

    listen   opens the sockets of one place; all places' are on the same ports
    serve    runs in a process of its own until it is told to stop; returns the exit code
    most     processes that there may ever be: then none that died is replaced
    look     called ten times a second; True where the processes have lost what they are for: all end, with exit code 1
    """

    def __init__(
        self,
        number: int,
        listen: Callable[[], list[socket.socket]],
        serve: Callable[[Place, Parent], int],
        on_ready: Callable[[], None],
        *,
        most: int | None = None,
        look: Callable[[], bool] = bool,
    ) -> None:
        self._listen = listen
        self._serve = serve
        self._on_ready = on_ready
        self._most = most
        self._started = 0
        self._look_beside = look
        self._manager = ServiceManager()
        # It is the parent that tells a service manager, of all of them.
        os.environ.pop("NOTIFY_SOCKET", None)
        os.environ.pop("WATCHDOG_USEC", None)
        self._places = [Place(number, listen()) for number in range(1, number + 1)]
        self._signals: list[int] = []
        self._stopping = False
        self._announced = False
        self._code = 0

    def run(self) -> int:
        """Until a signal, or until one fails before all were ready. The exit code is 0 where all have drained."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            # The first alone: what stops it would stop all of them, and is told once.
            self._start(self._places[0])
            while self._running() or not self._stopping:
                self._look()
            for place in self._places:
                place.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._code

    def _look(self) -> None:
        self._hear()
        while self._signals:
            self._pass_on(self._signals.pop(0))
        for place in self._running():
            pid, status = os.waitpid(place.pid, os.WNOHANG)
            if pid:
                self._ended(place, os.waitstatus_to_exitcode(status))
        if self._stopping:
            return
        if self._look_beside():
            self._code = 1
            for _ in range(2):  # there is nothing left to drain
                self._pass_on(signal.SIGTERM)
            return
        now = time.monotonic()
        if self._places[0].ready or self._announced:
            for place in self._places:
                if not place.pid and now >= place.again_at and not self._exhausted():
                    self._start(place)
        for place in self._running():
            if place.ready and not place.drains and now - place.told > _HUNG_S:
                _log.error("gateway_process_hangs", gateway=place.number, pid=place.pid, killed_after_s=_HUNG_S)
                place.told = now
                os.kill(place.pid, signal.SIGKILL)
        if not self._announced and all(place.ready for place in self._places):
            self._announced = True
            self._on_ready()
            self._manager.ready()
        self._manager.alive()

    def _exhausted(self) -> bool:
        """Ends where none is left and none may be started."""
        if self._most is None or self._started < self._most:
            return False
        if not self._running():
            self._stopping, self._code = True, 1
        return True

    def _running(self) -> list[Place]:
        return [place for place in self._places if place.pid]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_on(self, number: int) -> None:
        """The first one drains: from then on the processes alone hold their sockets, and take what waits there."""
        if not self._stopping:
            self._stopping = True
            self._manager.stopping()
            for place in self._places:
                place.close()
        for place in self._running():
            os.kill(place.pid, number)

    def _hear(self) -> None:
        """Waits a moment for what the processes tell."""
        told = {place.pipes[0]: place for place in self._running()}
        for pipe in select.select(list(told), [], [], _LOOK_S)[0]:
            word = os.read(pipe, 4096)
            if word:
                told[pipe].told = time.monotonic()
                told[pipe].ready = told[pipe].ready or b"r" in word
                told[pipe].drains = told[pipe].drains or b"s" in word
            else:
                time.sleep(_LOOK_S / 10)  # it ends

    def _start(self, place: Place) -> None:
        if not place.sockets:
            place.sockets = self._listen()
        self._started += 1
        place.process = self._started
        told, tell = os.pipe()
        alive, held = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            self._be(place, Parent(tell, alive), [told, held])
        os.close(tell)
        os.close(alive)
        place.pid, place.pipes = pid, (told, held)
        place.ready, place.drains = False, False
        place.began = place.told = time.monotonic()

    def _be(self, place: Place, parent: Parent, pipes: list[int]) -> NoReturn:
        """In the new process."""
        code = 1
        try:
            os.setpgid(0, 0)  # a terminal's Ctrl-C is for the parent, which passes it on
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for other in self._places:
                pipes += other.pipes
                if other is not place:
                    other.close()
            for pipe in pipes:
                os.close(pipe)
            code = self._serve(place, parent)
        except SynthiaError as error:
            click.echo(f"synthia-vllm: {error}", err=True)
            code = 2
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _ended(self, place: Place, code: int) -> None:
        for pipe in place.pipes:
            os.close(pipe)
        pid, ready = place.pid, place.ready
        place.pid, place.pipes, place.ready = 0, (), False
        if self._stopping:
            # One that was about to start had nothing to lose.
            self._code = max(self._code, _exit_code(code) if ready or not self._announced else 0)
            return
        if not self._announced:
            self._code = _exit_code(code) or 1
            self._pass_on(signal.SIGTERM)
            return
        now = time.monotonic()
        if now - place.began >= _STEADY_S:
            place.pause = _FIRST_PAUSE_S
        again = "never: restart all" if self._most is not None and self._started >= self._most else place.pause
        _log.error("gateway_process_died", gateway=place.number, pid=pid, code=code, again_in_s=again)
        place.again_at = now + place.pause
        if place.pause > _PATIENCE_S:
            place.close()
        place.pause = min(_MOST_PAUSE_S, 2 * place.pause)


def _exit_code(code: int) -> int:
    """As a shell tells it: that of a signal is 128 more."""
    return code if code >= 0 else 128 - code
