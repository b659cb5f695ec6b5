"""Backup and restore as docs/operations.md tells operators, while the ledger is written to."""

import re
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, make_url, select
from sqlalchemy.orm import Session

from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.tables import Entry
from tests.gateway.store.conftest import SECRET, MakeExchange
from tests.running import ROOT
from tests.services import Postgres
from tests.tools import needed

_PAGE = (ROOT / "docs" / "operations.md").read_text()
_ROWS_FIRST = 2000  # so many that a backup takes longer than a commit


class Load:
    """Rows written one by one until it is told to stop; `committed` are those whose commit has returned."""

    def __init__(self, ledger: Ledger, make_exchange: MakeExchange) -> None:
        self.committed: list[str] = []
        self._ledger, self._make_exchange = ledger, make_exchange
        self._over = threading.Event()

    def write(self, name: str) -> None:
        self._ledger.add(self._make_exchange(name))
        assert self._ledger.flush()
        self.committed.append(name)

    def run(self) -> None:
        number = 0
        while not self._over.is_set():
            self.write(f"during-{number:06}")
            number += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            while len(self.committed) < 20:
                self._over.wait(0.01)
            yield
        finally:
            self._over.set()
            thread.join()


def commands(fence: str) -> list[list[str]]:
    """The documented commands that back up or restore this kind of database, as words."""
    block = re.search(rf"```sh {fence}\n(.*?)```", _PAGE, re.DOTALL)
    assert block, fence
    return [re.findall(r'"[^"]*"|\S+', line) for line in block[1].strip().splitlines()]


def run(words: list[str], values: dict[str, str], cwd: Path) -> None:
    filled = []
    for word in words:
        text = word.strip('"')
        for name, value in values.items():
            text = text.replace(name, value)
        filled.append(text)
    subprocess.run(filled, check=True, capture_output=True, cwd=cwd)


def rows(engine: Engine) -> set[str]:
    with Session(engine) as session:
        return set(session.scalars(select(Entry.id)))


def filled(engine: Engine, make_exchange: MakeExchange) -> Ledger:
    ledger = Ledger(engine)
    for number in range(_ROWS_FIRST):
        ledger.add(make_exchange(f"before-{number:06}"))
    assert ledger.flush()
    return ledger


def test_sqlite_loses_nothing_that_was_committed_before(tmp_path: Path, make_exchange: MakeExchange) -> None:
    needed("sqlite3", "sqlite3")
    path = tmp_path / "synthia.db"
    engine = open_database(f"sqlite:///{path}")
    key = KeyStore(engine, SECRET).create("alice")[1]
    ledger = filled(engine, make_exchange)
    load = Load(ledger, make_exchange)
    values = {"synthia.db": str(path), "backup.db": str(tmp_path / "backup.db")}
    with load.running():
        before = set(load.committed)
        for words in commands("sqlite-backup"):
            run(words, values, tmp_path)
    expected = before | {f"before-{number:06}" for number in range(_ROWS_FIRST)}
    ledger.close()
    engine.dispose()
    for left in tmp_path.glob("synthia.db*"):  # the disk is lost
        left.unlink()
    for words in commands("sqlite-restore"):
        run(words, values, tmp_path)
    with sqlite3.connect(path) as restored:
        assert restored.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    engine = open_database(f"sqlite:///{path}")
    assert expected <= rows(engine)
    assert KeyStore(engine, SECRET).find(key) is not None
    engine.dispose()


def test_postgresql_loses_nothing_that_was_committed_before(
    postgres: Postgres, tmp_path: Path, make_exchange: MakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(postgres.binaries), prepend=":")
    url, restored = postgres.new_database(), postgres.new_database()
    engine = open_database(url)
    ledger = filled(engine, make_exchange)
    load = Load(ledger, make_exchange)
    dump = str(tmp_path / "backup.dump")
    with load.running():
        before = set(load.committed)
        for words in commands("postgresql-backup"):
            run(words, {"$DATABASE": _libpq(url), "backup.dump": dump}, tmp_path)
    ledger.close()
    engine.dispose()
    for words in commands("postgresql-restore"):
        run(words, {"$DATABASE": _libpq(restored), "backup.dump": dump}, tmp_path)
    engine = open_database(restored)
    assert before | {f"before-{number:06}" for number in range(_ROWS_FIRST)} <= rows(engine)
    engine.dispose()


def _libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
