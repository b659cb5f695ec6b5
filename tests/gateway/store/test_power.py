"""The power is cut: what a disk has, and nothing that is still in memory, is there afterwards."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.tables import Entry
from tests.chaos.network import need_root
from tests.gateway.store.conftest import MakeExchange

_LATER = "noatime,commit=300"  # what nobody asks ext4 to write, it writes after five minutes


class Disk:
    """An ext4 file system in a file; what was not synced is in none of that file's bytes."""

    def __init__(self, folder: Path) -> None:
        self._image = folder / "disk.img"
        self._mounts = ExitStack()
        with self._image.open("wb") as file:
            file.truncate(64 * 2**20)
        _run("mkfs.ext4", "-q", "-F", str(self._image))
        self.path = self._mount(self._image)

    def cut(self) -> Path:
        """The disk as it is after a power cut now."""
        copy = self._image.with_suffix(".cut")
        shutil.copyfile(self._image, copy)
        return self._mount(copy)

    def close(self) -> None:
        self._mounts.close()

    def _mount(self, image: Path) -> Path:
        folder = Path(f"{image}.mounted")
        folder.mkdir()
        _run("mount", "-o", f"loop,{_LATER}", str(image), str(folder))
        self._mounts.callback(_run, "umount", "-l", str(folder))
        return folder


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    need_root("mount", "umount", "mkfs.ext4")
    try:
        found = Disk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.decode().strip()}")
    yield found
    found.close()


@contextmanager
def keys(folder: Path) -> Iterator[KeyStore]:
    engine = open_database(f"sqlite:///{folder}/synthia.db")
    yield KeyStore(engine, b"")
    engine.dispose()


def test_a_power_cut_undoes_no_revocation(disk: Disk) -> None:
    with keys(disk.path) as store:
        key_id, key = store.create("alice")
        subprocess.run(["sync", "-f", str(disk.path)], check=True)
        store.revoke(key_id)
        with keys(disk.cut()) as after:
            assert [row["id"] for row in after.list_keys()] == [key_id]
            assert after.find(key) is None


def test_a_power_cut_takes_no_row_that_was_written(disk: Disk, make_exchange: MakeExchange) -> None:
    with keys(disk.path) as store:
        ledger = Ledger(store.engine)
        subprocess.run(["sync", "-f", str(disk.path)], check=True)
        ledger.add(make_exchange("a"))
        assert ledger.flush()
        with keys(disk.cut()) as after, Session(after.engine) as session:
            assert list(session.scalars(select(Entry.id))) == ["a"]
        ledger.close()
