"""PostgreSQL and Redis of a soak, which are stopped, started, and stand still for a while."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
import psycopg
import redis

from synthia_vllm.free_ports import free_port

_START_S = 60.0


@dataclass
class Store:
    """A server as a process of its own, in a group of its own: Ctrl-C is for the one who asked."""

    name: str
    port: int
    url: str
    command: Sequence[str]
    folder: Path
    answers: Callable[["Store"], bool]
    user: str | None = None  # whom it runs as; None: ourselves
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self) -> None:
        """Returns once it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, user=self.user, stdout=log, stderr=log, process_group=0
            )
        deadline = time.monotonic() + _START_S
        while not self.answers(self):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"{self.name} did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, clients or not. What it keeps on disk is whole."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def pause(self) -> None:
        """Connections stay open, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        whole = psutil.Process(self.process.pid)
        for process in (whole, *whole.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def running(store: Store) -> Iterator[Store]:
    try:
        store.start()
        yield store
    finally:
        store.stop()


def redis_in(folder: Path) -> Store:
    """Without persistence: it comes back empty. Not started yet."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise click.ClickException("redis-server is not installed (apt-get install redis-server)")
    folder.mkdir()
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return Store("redis", port, f"redis://127.0.0.1:{port}/0", command, folder, _redis_answers)


def postgres_in(folder: Path) -> Store:
    """A new and empty one. Not started yet."""
    found = shutil.which("postgres")
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found and not newest:
        raise click.ClickException("PostgreSQL is not installed (apt-get install postgresql)")
    binary = Path(found) if found else newest[-1]
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    folder.mkdir(mode=0o700)
    if user:
        shutil.chown(folder, user)
    data, port = folder / "data", free_port()
    made = [
        str(binary.with_name("initdb")),
        "-D",
        str(data),
        "-U",
        "postgres",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
    ]
    subprocess.run(made, cwd=folder, user=user, check=True, capture_output=True)
    options = {"port": str(port), "listen_addresses": "127.0.0.1", "unix_socket_directories": str(folder)}
    command = [str(binary), "-D", str(data)]
    command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    return Store("postgres", port, url, command, folder, _postgres_answers, user)


def _redis_answers(store: Store) -> bool:
    with redis.Redis.from_url(store.url, socket_timeout=1) as client, suppress(redis.RedisError):
        return bool(client.ping())
    return False


def _postgres_answers(store: Store) -> bool:
    with suppress(psycopg.OperationalError):
        psycopg.connect(host="127.0.0.1", port=store.port, user="postgres", connect_timeout=2).close()
        return True
    return False


def faults(postgres: Store, redis: Store) -> list[tuple[str, Callable[[], None], float, Callable[[], None]]]:
    """Those that come in turn: what it is, how it begins, for how many seconds it lasts, how it ends."""
    return [
        ("redis gone", redis.stop, 20.0, redis.start),
        ("postgres gone", postgres.stop, 20.0, postgres.start),
        ("redis stands still", redis.pause, 6.0, redis.go_on),
        ("postgres stands still", postgres.pause, 8.0, postgres.go_on),
    ]
