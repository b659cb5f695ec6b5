"""Real services for tests, started when the first test needs one and stopped by their process at the end."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from synthia_vllm.free_ports import free_port

REQUIRED = "SYNTHIA_REQUIRE_SERVICES"
_START_TIMEOUT_S = 30
_OPTIONS = {"fsync": "off", "max_connections": "50", "listen_addresses": "127.0.0.1"}


@dataclass
class Postgres:
    """A PostgreSQL server of our own in a temporary folder; `stop` and `start` are for tests of its loss."""

    binaries: Path
    folder: Path
    port: int
    user: str | None  # whom it runs as; None: ourselves
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{uuid4().hex[:12]}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self.url(name)

    def init(self) -> None:
        words = ["initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        done = subprocess.run(
            [self.binaries / words[0], *words[1:]],
            cwd=self.folder,
            user=self.user,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout}{done.stderr}")

    def start(self) -> None:
        options = {**_OPTIONS, "port": str(self.port), "unix_socket_directories": str(self.folder)}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        log = self.folder / "log"
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [self.binaries / "postgres", "-D", self.data, *words],
                cwd=self.folder,
                user=self.user,
                stdout=stream,
                stderr=stream,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._connect().close()
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"postgres did not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        """Ends it at once, clients or not (PostgreSQL's fast shutdown)."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=5
        )


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL; skips where there is none, unless SYNTHIA_REQUIRE_SERVICES=1."""
    binaries = _find_postgres()
    if binaries is None:
        missing("PostgreSQL is not installed (apt-get install postgresql)")
    user = None
    if os.geteuid() == 0:  # initdb refuses root
        user = "postgres"
        try:
            pwd.getpwnam(user)
        except KeyError:
            missing("PostgreSQL does not run as root, and there is no user `postgres`")
    # Not pytest's folder: the user `postgres` can't enter it. Short too: a socket's path is 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="synthia-pg-"))
    if user is not None:
        shutil.chown(folder, user)
    server = Postgres(binaries, folder, free_port(), user)
    try:
        server.init()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _find_postgres() -> Path | None:
    """The folder with initdb and postgres; the newest where Debian keeps several."""
    found = shutil.which("initdb")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name.split(".")[0]))
    candidates = ([Path(found).parent] if found else []) + versions[::-1]
    return next((path for path in candidates if (path / "postgres").exists() and (path / "initdb").exists()), None)


def missing(reason: str) -> None:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}; {REQUIRED}=1 asks for it")
    pytest.skip(reason)
