"""API keys and their users: made, found, rotated, revoked."""

import contextlib
import hashlib
import hmac
import os
import secrets
import string
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.accounts import Account, Priority, UserLimits
from synthia_vllm.gateway.store.database import data_folder, insert_or_ignore
from synthia_vllm.gateway.store.tables import Key, Revision, User, as_dict
from synthia_vllm.settings import Settings

PREFIX = "sk-synthia-"
_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH, _SECRET_LENGTH = 8, 32  # 32 letters of 62: 190 bits
_OF_A_NEW_USER: dict[str, Any] = {"weight": 1.0, "priority": "interactive"}
_KEY_LENGTH = len(PREFIX) + _ID_LENGTH + _SECRET_LENGTH


class UnknownKey(SetupError):
    """There is no key with that id, or it has ended."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no active key {key_id!r}; `synthia-vllm keys list` shows the ids")


class UnknownUser(SetupError):
    """There is no user of that name."""

    def __init__(self, user: str) -> None:
        super().__init__(f"there is no user {user!r}; `synthia-vllm keys create --user` makes one with its first key")


def load_secret(settings: Settings) -> bytes:
    """What key hashes are keyed with: as set, or made once in the data folder.

    Without it a stolen database does not even let a guess be tried. Several gateways on one database must share it.
    """
    if settings.access.secret is not None:
        return settings.access.secret.get_secret_value().encode()
    try:
        path = data_folder() / "key-secret"
        if not path.exists():
            _make_secret(path)
        secret = path.read_text().strip()
    except OSError as error:
        raise SetupError(
            f"{error.filename}: {error.strerror}; give --access.secret, or a SYNTHIA_DATA to write to"
        ) from None
    if not secret:
        raise SetupError(f"{path} is empty; restore it from a backup, or delete it and make all keys anew")
    return secret.encode()


def _make_secret(path: Path) -> None:
    # Written whole before it has its name: another process that starts now never reads half a secret.
    own = path.with_name(f".key-secret-{secrets.token_hex(8)}")
    with os.fdopen(os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    own.unlink()


class KeyStore:
    """Keys in the database. Every change bumps the revision in the same transaction, which is what caches watch.

    Keys are `sk-synthia-`, eight characters of id and 32 of secret; stored is their HMAC-SHA256. They are random, so a
    slow hash would add nothing but time.
    """

    def __init__(self, engine: Engine, secret: bytes) -> None:
        self.engine = engine
        self._secret = secret

    def create(
        self,
        user: str,
        *,
        admin: bool = False,
        expires: float | None = None,
        weight: float | None = None,
        priority: Priority | None = None,
        limits: UserLimits | None = None,
        models: Sequence[str] | None = None,
        unset: Collection[str] = (),
    ) -> tuple[str, str]:
        """Makes a key, and its user if need be; returns id and key.

        What is None leaves an existing user as it is; what is named in `unset` is as if it had never been set.
        """
        with Session(self.engine) as session, session.begin():
            new = {"name": user, **_OF_A_NEW_USER, "created": time.time()}
            session.execute(insert_or_ignore(self.engine, User, "name"), new)
            _change(session.get_one(User, user), weight, priority, limits, models, unset)
            return self._add(session, user, admin=admin, expires=expires)

    def change(
        self,
        user: str,
        *,
        weight: float | None = None,
        priority: Priority | None = None,
        limits: UserLimits | None = None,
        models: Sequence[str] | None = None,
        unset: Collection[str] = (),
    ) -> dict[str, Any]:
        """Sets what holds for a user, as `create` does, without another key; returns all of it. Raises UnknownUser."""
        with Session(self.engine) as session, session.begin():
            row = session.get(User, user)
            if row is None:
                raise UnknownUser(user)
            _change(row, weight, priority, limits, models, unset)
            _bump(session)
            return as_dict(row)

    def rotate(self, key_id: str, grace: float = 0.0) -> tuple[str, str]:
        """A new key with the same end for the same user; the old one ends after `grace` seconds.

        Raises UnknownKey, also for a key that has expired or was rotated before.
        """
        with Session(self.engine) as session, session.begin():
            old, now = self._active(session, key_id), time.time()
            expires = old.expires
            if old.rotated is not None or (expires is not None and expires <= now):
                raise UnknownKey(key_id)
            old.rotated = now
            old.expires = now + grace if expires is None else min(now + grace, expires)
            if grace <= 0:
                old.revoked = now
            return self._add(session, old.user, admin=old.admin, expires=expires)

    def revoke(self, key_id: str) -> None:
        """Ends a key. Raises UnknownKey."""
        with Session(self.engine) as session, session.begin():
            self._active(session, key_id).revoked = time.time()
            _bump(session)

    def list_keys(self) -> list[dict[str, Any]]:
        """All keys, the revoked ones too, oldest first; without what would open anything."""
        with Session(self.engine) as session:
            rows = session.scalars(select(Key).order_by(Key.created)).all()
            return [{name: value for name, value in as_dict(row).items() if name != "digest"} for row in rows]

    def list_users(self) -> list[dict[str, Any]]:
        with Session(self.engine) as session:
            return [as_dict(row) for row in session.scalars(select(User).order_by(User.name))]

    def find(self, presented: str) -> Account | None:
        """The account that a key opens, if it is neither unknown nor revoked. Expiry is for the caller to watch."""
        digest = self.digest(presented)
        with Session(self.engine) as session:
            found = session.execute(
                select(Key, User).join(User).where(Key.digest == digest, Key.revoked.is_(None))
            ).one_or_none()
            if found is None or not hmac.compare_digest(found[0].digest, digest):
                return None
            key, user = found
            return Account(
                user=user.name,
                weight=user.weight,
                priority=user.priority,
                limits=UserLimits.of(user),
                models=frozenset(user.models) if user.models else None,
                admin=key.admin,
                key_id=key.id,
                expires=key.expires,
            )

    def revision(self) -> int:
        """Goes up with each change."""
        with Session(self.engine) as session:
            return session.scalars(select(Revision.number)).one()

    def digest(self, presented: str) -> str:
        return hmac.new(self._secret, presented.encode(), hashlib.sha256).hexdigest()

    def _active(self, session: Session, key_id: str) -> Key:
        key = session.get(Key, key_id) if key_id.isalnum() else None  # PostgreSQL takes no NUL
        if key is None or key.revoked is not None:
            raise UnknownKey(key_id)
        return key

    def _add(self, session: Session, user: str, *, admin: bool, expires: float | None) -> tuple[str, str]:
        key_id, secret = _random(_ID_LENGTH), _random(_SECRET_LENGTH)
        plain = f"{PREFIX}{key_id}{secret}"
        now = time.time()
        session.add(Key(id=key_id, user=user, digest=self.digest(plain), admin=admin, created=now, expires=expires))
        _bump(session)
        return key_id, plain


def well_formed(presented: str) -> bool:
    """Whether this could be a key at all: anything else is not worth a look-up."""
    return (
        len(presented) == _KEY_LENGTH
        and presented.startswith(PREFIX)
        and presented.isascii()
        and (presented[len(PREFIX) :].isalnum())
    )


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _change(
    row: User,
    weight: float | None,
    priority: Priority | None,
    limits: UserLimits | None,
    models: Sequence[str] | None,
    unset: Collection[str],
) -> None:
    given = {"weight": weight, "priority": priority, "models": list(models) if models else None}
    given |= asdict(limits) if limits is not None else {}
    for name, value in given.items():
        if value is not None or name in unset:
            setattr(row, name, _OF_A_NEW_USER.get(name) if name in unset else value)


def _bump(session: Session) -> None:
    session.execute(update(Revision).values(number=Revision.number + 1))
