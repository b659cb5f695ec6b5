"""Opening the database: where it is, how it is set up, and that its tables are there."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import platformdirs
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.store.tables import Base
from synthia_vllm.secret_urls import DATABASE_FORM, database_url

DATA_VARIABLE = "SYNTHIA_DATA"
# A server behind a line that drops its packets is lost after these; else a query waits for a quarter of an hour, and
# where the line heals, until its packet is sent once more. What an address says itself, holds.
_PATIENCE = {
    "connect_timeout": 5,  # seconds, for each host of the address
    "tcp_user_timeout": 5000,  # milliseconds for what was sent to arrive
    "keepalives_idle": 3,  # seconds of silence, then a probe a second
    "keepalives_interval": 1,
    "keepalives_count": 3,
}
_CHECKOUT_S = 5.0  # for a connection of the pool to be free
_SESSION = {"statement_timeout": "30s", "idle_in_transaction_session_timeout": "60s"}
_BUSY_TIMEOUT_MS = 5000
# Two gateways that start together must not both make the tables. Any number will do that nobody else uses.
_POSTGRES_LOCK = 0x53594E54


def data_folder() -> Path:
    """Where keys and usage are kept, readable by its owner only; `SYNTHIA_DATA` names another."""
    given = os.environ.get(DATA_VARIABLE)
    folder = Path(given).expanduser() if given else platformdirs.user_data_path("synthia-vllm", appauthor=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def open_database(url: str | None = None, *, read_only: bool = False) -> Engine:
    """An engine on a database whose tables are up to date. None is SQLite in the data folder.

    For who only reads (`read_only`), a SQLite file that can't be written, such as a backup, is opened as it is.
    Raises SetupError for an address that is none, or where nothing answers; the password is never shown.
    """
    try:
        address = make_url(url or f"sqlite:///{data_folder() / 'synthia.db'}")
        if address.get_backend_name() != "sqlite":
            database_url(address.host, address.username, address.database, *map(str, address.query.values()))
        locked = read_only and _locked(address)
        engine = _create_read_only(address) if locked else _create(address, bounded=not read_only)
    except OSError as error:
        where = shown(address) if url else f"in {error.filename}"
        raise SetupError(f"--access.database {where}: {error.strerror}; name a file that this user may write") from None
    except ImportError as error:
        raise SetupError(f"--access.database: {error}; install what its URL names, or name another") from None
    except (ArgumentError, ValueError):  # whose text may hold a part of the password
        raise SetupError(f"--access.database: {DATABASE_FORM}") from None
    where = shown(address)
    try:
        if locked:
            _check_version(engine)
        else:
            migrate(engine)
    except (SQLAlchemyError, OSError) as error:  # an OSError: of the lock's file
        engine.dispose()
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise SetupError(f"--access.database {where}: {reason}; is it running, and may this user open it?") from None
    except CommandError as error:
        engine.dispose()
        cure = "copy it to where it can be written" if locked else "a newer version has opened it: install that"
        raise SetupError(f"--access.database {where}: {error}; {cure}") from None
    return engine


def shown(address: URL) -> str:
    """Where a database is, less who asks it and how: a password may stand in any of that."""
    return URL.create(address.drivername, None, None, address.host, address.port, address.database).render_as_string()


def migrate(engine: Engine) -> None:
    """Brings the tables up to date, once even where several processes start at the same time."""
    if engine.dialect.name == "sqlite" and engine.url.database:
        with filelock.FileLock(f"{engine.url.database}.lock", mode=0o600), engine.begin() as connection:
            # Else Python's sqlite3 makes each table outside of a transaction, and a killed start leaves half of them.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            _upgrade(connection)
        return
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))  # a large ledger may take its time
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})
        _upgrade(connection)


def insert_or_ignore(engine: Engine, table: type[Base], key: str) -> Any:
    """An INSERT that leaves a row with the same key as it is."""
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing(index_elements=[key])


def _create(address: URL, *, bounded: bool) -> Engine:
    """`bounded`: no statement takes for ever, which a sum over years may need."""
    if address.get_backend_name() != "sqlite":
        patience = {name: value for name, value in _PATIENCE.items() if name not in address.query}
        engine = create_engine(address, pool_pre_ping=True, pool_timeout=_CHECKOUT_S, connect_args=patience)
        if bounded and "options" not in address.query:
            event.listen(engine, "connect", _prepare_postgres)
        return engine
    if address.database and address.database != ":memory:":
        # Made here, so that nobody else can read it before its mode is set. SQLite's other files take its mode.
        os.close(os.open(address.database, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(address)
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _locked(address: URL) -> bool:
    """Whether it's a SQLite file that this process can't write, or not in the way that SQLite does."""
    if address.get_backend_name() != "sqlite" or not address.database:
        return False
    file = Path(address.database)
    return file.is_file() and not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK))


def _create_read_only(address: URL) -> Engine:
    assert address.database is not None
    log = Path(f"{address.database}-wal")
    # A file in WAL mode is read without its companions only where it is said that nobody writes it: true without a log.
    fixed = {} if log.exists() and log.stat().st_size else {"immutable": "1"}
    return create_engine(
        address.set(database=f"file:{quote(address.database)}", query={"mode": "ro", "uri": "true", **fixed})
    )


def _check_version(engine: Engine) -> None:
    """Raises CommandError for a database that would have to be changed before it can be read."""
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found != ScriptDirectory.from_config(_alembic()).get_current_head():
        raise CommandError("its tables are another version's, and it can't be written")


def _prepare_postgres(connection: Any, _: object) -> None:
    with connection.cursor() as cursor:
        for name, value in _SESSION.items():
            cursor.execute(f"SET {name} = '{value}'")
    connection.commit()


def _prepare_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # FULL: with NORMAL a power cut takes back the last commits, a key's revocation among them. The ledger pays a sync
    # for each batch, beside the requests.
    for pragma in ("journal_mode=WAL", f"busy_timeout={_BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", "synthia_vllm.gateway.store:migrations")
    return config


def _upgrade(connection: Connection) -> None:
    config = _alembic()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
