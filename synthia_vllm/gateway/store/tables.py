"""The tables, as SQLAlchemy sees them. `migrations/` makes them."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from synthia_vllm.gateway.accounts import Priority


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s"})


class User(Base):
    """Whom keys belong to, and what they may."""

    __tablename__ = "users"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    weight: Mapped[float] = mapped_column(Float, default=1.0)
    priority: Mapped[Priority] = mapped_column(String(16), default="interactive")
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    concurrent_requests: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_month: Mapped[int | None] = mapped_column(BigInteger)
    models: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    created: Mapped[float] = mapped_column(Float)  # Unix time, seconds, as all times here


class Key(Base):
    """An API key. Only its keyed hash is here."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    user: Mapped[str] = mapped_column(ForeignKey("users.name"))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    admin: Mapped[bool] = mapped_column(Boolean, default=False)
    created: Mapped[float] = mapped_column(Float)
    expires: Mapped[float | None] = mapped_column(Float)
    revoked: Mapped[float | None] = mapped_column(Float)
    rotated: Mapped[float | None] = mapped_column(Float)  # another was made in its place


class Revision(Base):
    """One row that goes up with every change of users or keys: what caches watch."""

    __tablename__ = "revision"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, default=0)


class Entry(Base):
    """The bill of one request."""

    __tablename__ = "ledger"
    __table_args__ = (Index(None, "user", "arrived_at"), Index(None, "arrived_at"), Index(None, "user", "request_id"))

    id: Mapped[str] = mapped_column(String(160), primary_key=True)
    request_id: Mapped[str] = mapped_column(String(160))
    user: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(Text)
    route: Mapped[str] = mapped_column(String(64))
    arrived_at: Mapped[float] = mapped_column(Float)
    duration: Mapped[float] = mapped_column(Float)  # seconds
    queue_wait: Mapped[float] = mapped_column(Float)  # seconds
    time_to_first_token: Mapped[float | None] = mapped_column(Float)  # seconds
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    generated_tokens: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[int] = mapped_column(Integer)
    outcome: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(String(32))


class Writer(Base):
    """A process that writes the ledger. One that never said that it ended may have taken rows with it."""

    __tablename__ = "writers"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    started: Mapped[float] = mapped_column(Float)
    last_flush: Mapped[float] = mapped_column(Float)
    # What was under way then: requests, their tokens so far, and the most that these might come to.
    open_requests: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    open_tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    open_tokens_most: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    ended: Mapped[float | None] = mapped_column(Float)
    gap: Mapped[bool] = mapped_column(Boolean, default=False)  # ended without a word: rows after last_flush are lost


def as_dict(row: Any) -> dict[str, Any]:
    """A row's columns by name."""
    return {column.name: getattr(row, column.name) for column in row.__table__.columns}
