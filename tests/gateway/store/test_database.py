import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from alembic import command
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.exc import OperationalError

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.store.database import _alembic, open_database
from synthia_vllm.gateway.store.keys import KeyStore
from synthia_vllm.gateway.store.usage import usage
from tests.services import Postgres

TABLES = {"users", "keys", "revision", "ledger", "writers"}
_OPEN = "import sys; from synthia_vllm.gateway.store.database import open_database; open_database(sys.argv[1])"


def test_opening_makes_the_tables_once(url: str) -> None:
    open_database(url).dispose()
    engine = open_database(url)
    assert set(inspect(engine).get_table_names()) >= TABLES
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM revision")).scalar() == 1
    engine.dispose()


def test_the_models_are_what_the_migrations_make(engine: Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from synthia_vllm.gateway.store.tables import Base

    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_processes_that_start_together_make_the_tables_once(url: str) -> None:
    starts = [subprocess.Popen([sys.executable, "-c", _OPEN, url], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in starts]
    assert [code for _, code in ends] == [0, 0, 0], ends
    engine = open_database(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1
        assert connection.execute(text("SELECT count(*) FROM revision")).scalar() == 1
    engine.dispose()


def test_the_default_is_sqlite_that_only_its_owner_reads(data_folder: Path) -> None:
    engine = open_database(None)
    with engine.begin() as connection:
        connection.execute(text("UPDATE revision SET number = 1"))
    assert stat.S_IMODE(data_folder.stat().st_mode) == 0o700
    files = sorted(data_folder.iterdir())
    assert data_folder / "synthia.db" in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    engine.dispose()


def test_sqlite_is_set_up_for_several_processes() -> None:
    engine = open_database(None)
    with engine.connect() as connection:
        pragmas = ("journal_mode", "busy_timeout", "synchronous", "foreign_keys")
        found = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in pragmas]
    assert found == ["wal", 5000, 2, 1]
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql+psycopg://user:hunter2@127.0.0.1:1/none", "hunter2"])
def test_what_cannot_be_opened_is_told_without_the_password(url: str) -> None:
    with pytest.raises(SetupError, match=r"--access\.database") as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough to be looked at " * 40)
    with pytest.raises(SetupError, match=r"--access\.database"):
        open_database(f"sqlite:///{file}")


@pytest.mark.parametrize("url", ["sqlite:////nowhere/a.db", "sqlite:////tmp", "postgresql+psycopg://u:hunter2@h:x/d"])
def test_an_address_that_is_wrong_is_told(url: str) -> None:
    with pytest.raises(SetupError, match=r"--access\.database"):
        open_database(url)


def test_tables_of_a_newer_version_are_told(url: str) -> None:
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SetupError, match=r"--access\.database"):
        open_database(url)


def test_a_migration_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'cut.db'}"
    cut = (
        "import os, sys; from sqlalchemy import Engine, event\n"
        "from synthia_vllm.gateway.store.database import open_database\n"
        "def die(conn, cursor, statement, *rest):\n"
        "    if 'CREATE TABLE ledger' in statement: os._exit(9)\n"
        "event.listen(Engine, 'before_cursor_execute', die); open_database(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", cut, url], check=False).returncode == 9
    open_database(url).dispose()


def test_tables_of_the_version_before_are_brought_up_to_date_with_what_is_in_them(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text("INSERT INTO writers (id, host, pid, started, last_flush, gap) VALUES ('w', 'h', 1, 1.0, 2.0, :no)"),
            {"no": False},
        )
    engine.dispose()
    engine = open_database(url)
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT id, last_flush, open_requests, open_tokens, open_tokens_most FROM writers")
        )
        assert [tuple(row) for row in rows] == [("w", 2.0, 0, 0, 0)]
    engine.dispose()


def asked(engine: Engine, *words: str) -> tuple[str, ...]:
    """What PostgreSQL says of settings, and its driver of a connection's."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        known = driver.info.get_parameters()
        return tuple(
            known[word] if word in known else connection.execute(text(f"SHOW {word}")).scalar() for word in words
        )


def test_no_question_to_postgresql_takes_for_ever(postgres: Postgres) -> None:
    url = postgres.new_database()
    words = ("statement_timeout", "connect_timeout", "tcp_user_timeout", "keepalives_idle")
    for address, wanted in (
        (url, ("30s", "5", "5000", "3")),
        (f"{url}?connect_timeout=9&tcp_user_timeout=700", ("30s", "9", "700", "3")),
        (f"{url}?options=-cstatement_timeout%3D7s", ("7s", "5", "5000", "3")),
    ):
        engine = open_database(address)
        assert asked(engine, *words) == wanted
        engine.dispose()
    engine = open_database(f"{url}?options=-cstatement_timeout%3D100ms")
    with engine.connect() as connection, pytest.raises(OperationalError, match="statement timeout"):
        connection.execute(text("SELECT pg_sleep(60)"))
    engine.dispose()


def test_a_sum_over_years_may_take_its_time(postgres: Postgres) -> None:
    engine = open_database(postgres.new_database(), read_only=True)
    assert asked(engine, "statement_timeout", "tcp_user_timeout") == ("0", "5000")
    engine.dispose()


def test_a_lost_connection_is_replaced(postgres: Postgres) -> None:
    engine = open_database(postgres.new_database())
    postgres.stop()
    postgres.start()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()


@pytest.fixture
def backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database with a key, in a folder that this process may not write."""
    file = tmp_path / "backup #1?.db"
    engine = open_database(f"sqlite:///{quote(str(file))}")
    KeyStore(engine, b"").create("alice")
    engine.dispose()
    (tmp_path / f"{file.name}.lock").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    return file


def test_a_backup_that_cant_be_written_is_read_as_it_is(backup: Path) -> None:
    before = backup.read_bytes()
    engine = open_database(f"sqlite:///{quote(str(backup))}", read_only=True)
    assert [row["user"] for row in KeyStore(engine, b"").list_keys()] == ["alice"]
    assert usage(engine) == []
    with pytest.raises(OperationalError, match="readonly"):
        KeyStore(engine, b"").create("bob")
    engine.dispose()
    assert [it.name for it in backup.parent.iterdir() if it.is_file()] == [backup.name]
    assert backup.read_bytes() == before


def test_what_a_server_wrote_last_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/live.db"
    engine = open_database(url)
    KeyStore(engine, b"").create("alice")
    assert (tmp_path / "live.db-wal").stat().st_size
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    reading = open_database(url, read_only=True)
    assert [row["user"] for row in KeyStore(reading, b"").list_keys()] == ["alice"]
    reading.dispose()
    engine.dispose()


def test_a_backup_of_another_version_that_cant_be_written_is_told(backup: Path) -> None:
    with contextlib.closing(sqlite3.connect(backup)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'older'")
    with pytest.raises(SetupError, match=r"another version's.*copy it to where it can be written"):
        open_database(f"sqlite:///{quote(str(backup))}", read_only=True)


def test_a_file_that_is_no_database_is_told_where_it_cant_be_written(backup: Path) -> None:
    backup.write_bytes(b"no database" * 1000)
    with pytest.raises(SetupError, match="not a database"):
        open_database(f"sqlite:///{quote(str(backup))}", read_only=True)
