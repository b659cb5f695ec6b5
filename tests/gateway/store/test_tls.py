"""The stores over TLS, as docs/operations.md says it: their certificate is checked, and another one's is refused."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from sqlalchemy import text

from synthia_vllm.errors import SetupError
from synthia_vllm.free_ports import free_port
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore
from synthia_vllm.settings import Settings
from tests.running import until
from tests.services import Postgres, missing


@dataclass
class Certificate:
    """One that has signed itself: who trusts it, trusts it alone."""

    certificate: Path
    key: Path


def certificate(folder: Path, name: str, address: str = "IP:127.0.0.1") -> Certificate:
    found = Certificate(folder / f"{name}.crt", folder / f"{name}.key")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    words += ["-addext", f"subjectAltName={address}", "-keyout", str(found.key), "-out", str(found.certificate)]
    subprocess.run(words, check=True, capture_output=True)
    return found


@contextmanager
def over_tls(postgres: Postgres, own: Certificate) -> Iterator[None]:
    """It shows this certificate until then."""
    files = {"ssl_cert_file": own.certificate, "ssl_key_file": own.key}
    for path in files.values():
        shutil.copy(path, postgres.folder / path.name)
        if postgres.user is not None:
            shutil.chown(postgres.folder / path.name, postgres.user)
        (postgres.folder / path.name).chmod(0o600)
    told = {name: f"'{postgres.folder / path.name}'" for name, path in files.items()}
    engine = open_database(postgres.url())
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for name, value in (*told.items(), ("ssl", "on")):
                connection.execute(text(f"ALTER SYSTEM SET {name} = {value}"))
            connection.execute(text("SELECT pg_reload_conf()"))
        until(lambda: _shows_tls(postgres), "PostgreSQL speaks TLS")
        yield
    finally:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ALTER SYSTEM RESET ALL"))
            connection.execute(text("SELECT pg_reload_conf()"))
        engine.dispose()


def _shows_tls(postgres: Postgres) -> bool:
    engine = open_database(postgres.url())
    with engine.connect() as connection:
        on = connection.execute(text("SHOW ssl")).scalar() == "on"
    engine.dispose()
    return on


def test_a_database_over_tls_is_known_by_its_certificate(postgres: Postgres, tmp_path: Path) -> None:
    own, other = certificate(tmp_path, "own"), certificate(tmp_path, "other")
    url = postgres.new_database()
    with over_tls(postgres, own):
        engine = open_database(f"{url}?sslmode=verify-full&sslrootcert={own.certificate}")
        with engine.connect() as connection:
            assert connection.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar()
        assert KeyStore(engine, b"x" * 32).create("alice")[1]
        engine.dispose()
        with pytest.raises(SetupError, match="certificate verify failed"):
            open_database(f"{url}?sslmode=verify-full&sslrootcert={other.certificate}")


def test_a_database_with_another_ones_name_is_refused(postgres: Postgres, tmp_path: Path) -> None:
    elsewhere = certificate(tmp_path, "elsewhere", "DNS:db.example.com")
    url = postgres.new_database()
    with over_tls(postgres, elsewhere), pytest.raises(SetupError, match=r"db\.example\.com"):
        open_database(f"{url}?sslmode=verify-full&sslrootcert={elsewhere.certificate}")


@pytest.fixture
def redis_over_tls(tmp_path: Path) -> Iterator[tuple[int, Certificate]]:
    own, port = certificate(tmp_path, "redis"), free_port()
    words = ["redis-server", "--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no", "--save", ""]
    words += ["--tls-cert-file", str(own.certificate), "--tls-key-file", str(own.key), "--bind", "127.0.0.1"]
    if shutil.which("redis-server") is None:
        missing("redis-server is not installed (Debian: redis-server)")
    process = subprocess.Popen([*words, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis.from_url(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={own.certificate}")
        until(lambda: _answers(client), "Redis speaks TLS")
        yield port, own
    finally:
        process.kill()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


async def test_limits_over_tls_are_counted_by_the_redis_that_is_meant(
    redis_over_tls: tuple[int, Certificate], tmp_path: Path
) -> None:
    port, own = redis_over_tls
    other = certificate(tmp_path, "other")
    for trusted, counted in ((own, True), (other, False)):
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={trusted.certificate}"
        told = Settings(limits={"redis": url}).limits.redis
        assert told is not None
        limiter = SharedLimiter(told.get_secret_value(), timeout=30.0)
        assert await limiter.reserve("alice", UserLimits(tokens_per_minute=100), "call", 10) is None
        assert (limiter._down_since is None) == counted, "one that is not trusted is as one that is gone"
        await limiter.close()
