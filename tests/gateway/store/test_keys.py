import re
import stat
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore, UnknownKey, load_secret, well_formed
from synthia_vllm.settings import load_settings
from tests.gateway.store.conftest import SECRET


def test_a_key_opens_its_users_account(store: KeyStore) -> None:
    limits = UserLimits(requests_per_minute=60, tokens_per_month=1_000_000)
    key_id, key = store.create("alice", weight=3.0, priority="batch", limits=limits, models=["synthia"])
    assert re.fullmatch(r"sk-synthia-[0-9A-Za-z]{40}", key)
    account = store.find(key)
    assert account is not None
    assert (account.user, account.weight, account.priority, account.limits) == ("alice", 3.0, "batch", limits)
    assert (account.models, account.admin, account.key_id) == (frozenset({"synthia"}), False, key_id)


def test_what_is_not_given_leaves_the_user_as_it_is(store: KeyStore) -> None:
    store.create("alice", weight=2.0, limits=UserLimits(tokens_per_minute=500))
    _, key = store.create("alice", admin=True, limits=UserLimits(concurrent_requests=4))
    account = store.find(key)
    assert account is not None
    assert account.admin
    assert account.weight == 2.0
    assert account.limits == UserLimits(tokens_per_minute=500, concurrent_requests=4)
    assert len(store.list_users()) == 1


def test_no_key_is_in_the_database(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'keys.db'}")
    key_id, key = KeyStore(engine, SECRET).create("alice")
    with engine.connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    engine.dispose()
    content = b"".join(file.read_bytes() for file in tmp_path.glob("keys.db*"))
    assert key_id.encode() in content
    assert key.encode() not in content
    assert key[-32:].encode() not in content


def test_the_hash_depends_on_the_secret(store: KeyStore) -> None:
    _, key = store.create("alice")
    assert KeyStore(store.engine, b"another secret").find(key) is None


def test_an_unknown_key_opens_nothing(store: KeyStore) -> None:
    _, key = store.create("alice")
    assert store.find(key[:-1] + ("a" if key[-1] != "a" else "b")) is None
    assert store.find("sk-synthia-" + "x" * 40) is None


@pytest.mark.parametrize(
    "key", ["", "sk-synthia-", "sk-other-" + "a" * 40, "sk-synthia-" + "a" * 39, "sk-synthia-" + "a" * 39 + "é"]
)
def test_what_cannot_be_a_key_is_not_well_formed(key: str) -> None:
    assert not well_formed(key)
    assert not well_formed("sk-synthia-" + "a" * 200)


def test_a_revoked_key_opens_nothing(store: KeyStore) -> None:
    key_id, key = store.create("alice")
    store.revoke(key_id)
    assert store.find(key) is None
    with pytest.raises(UnknownKey, match=key_id):
        store.revoke(key_id)


def test_rotation_ends_the_old_key_at_once(store: KeyStore) -> None:
    key_id, old = store.create("alice", admin=True)
    new_id, new = store.rotate(key_id)
    assert store.find(old) is None
    account = store.find(new)
    assert account is not None
    assert (account.key_id, account.user, account.admin) == (new_id, "alice", True)


def test_rotation_with_grace_leaves_the_old_key_for_so_long(store: KeyStore) -> None:
    key_id, old = store.create("alice")
    before = time.time()
    _, new = store.rotate(key_id, 3600)
    ending, lasting = store.find(old), store.find(new)
    assert ending is not None
    assert lasting is not None
    assert ending.expires is not None
    assert before + 3600 <= ending.expires <= time.time() + 3600
    assert lasting.expires is None


def test_every_change_moves_the_revision(store: KeyStore) -> None:
    seen = [store.revision()]
    key_id, _ = store.create("alice")
    seen.append(store.revision())
    new_id, _ = store.rotate(key_id, 60)
    seen.append(store.revision())
    store.revoke(new_id)
    seen.append(store.revision())
    assert seen == sorted(set(seen))


def test_lists_tell_all_but_the_hash(store: KeyStore) -> None:
    first, _ = store.create("alice")
    second, _ = store.create("bob", expires=2_000_000_000.0)
    store.revoke(first)
    keys = store.list_keys()
    assert [key["id"] for key in keys] == [first, second]
    assert keys[0]["revoked"] is not None
    assert keys[1]["expires"] == 2_000_000_000.0
    assert not any("digest" in key for key in keys)
    assert [user["name"] for user in store.list_users()] == ["alice", "bob"]


def test_one_new_user_can_get_several_keys_at_once(store: KeyStore) -> None:
    errors: list[Exception] = []
    together = threading.Barrier(8)

    def create() -> None:
        together.wait()
        try:
            store.create("alice")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.list_keys()) == 8


@pytest.mark.parametrize("ended", ["in_grace", "expired"])
def test_a_rotated_key_does_not_inherit_an_end_that_is_near_or_past(store: KeyStore, ended: str) -> None:
    key_id, _ = store.create("alice", expires=time.time() - 5 if ended == "expired" else None)
    if ended == "in_grace":
        store.rotate(key_id, 60)
    try:
        _, new = store.rotate(key_id, 60)
    except SetupError:
        return  # to refuse is right as well
    account = store.find(new)
    assert account is not None
    assert account.expires is None


def test_the_secret_is_made_once_for_its_owner(data_folder: Path) -> None:
    settings = load_settings([])
    secret = load_secret(settings)
    assert load_secret(settings) == secret
    assert len(secret) == 64
    assert stat.S_IMODE((data_folder / "key-secret").stat().st_mode) == 0o600


def test_a_secret_that_is_set_needs_no_file(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHIA_ACCESS__SECRET", "given")
    assert load_secret(load_settings([])) == b"given"
    assert not (data_folder / "key-secret").exists()
