"""What the ledger adds up to."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Engine, Integer, case, cast, func, select
from sqlalchemy.orm import Session

from synthia_vllm.gateway.store.tables import Entry, Writer

By = Literal["user", "day", "model"]
_DAY_S = 86_400
_MOST = 100  # receipts of one id


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Requests and tokens of one user, day (UTC) or model. Refused requests cost nothing and are counted apart."""

    name: str
    requests: int
    refused: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one request came to: Unix time, seconds, tokens. `id` is the gateway's own, which no other request has."""

    id: str
    model: str
    route: str
    arrived_at: float
    duration: float
    queue_wait: float
    time_to_first_token: float | None
    prompt_tokens: int
    generated_tokens: int
    status: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A gateway ended without a word: its rows from `since` to at most `until` may be missing. Unix times.

    At `since` so many requests were under way, with so many tokens; they came to no more than `tokens_most`.
    """

    since: float
    until: float
    requests: int = 0
    tokens: int = 0
    tokens_most: int = 0


def usage(
    engine: Engine,
    *,
    user: str | None = None,
    since: float | None = None,
    until: float | None = None,
    by: By = "user",
) -> list[UsageRow]:
    """Sums over requests that arrived in [since, until), Unix times, ordered by name."""
    names: dict[By, ColumnElement[Any]] = {
        "user": Entry.user.expression,
        "model": Entry.model.expression,
        "day": cast(func.floor(Entry.arrived_at / _DAY_S), Integer),
    }
    name = names[by]
    refused = func.sum(case((Entry.outcome == "rejected", 1), else_=0))
    query = select(name, func.count(), refused, func.sum(Entry.prompt_tokens), func.sum(Entry.generated_tokens)).where(
        *_between(user, since, until)
    )
    with Session(engine) as session:
        rows: Sequence[Any] = session.execute(query.group_by(name).order_by(name)).all()
    return [
        UsageRow(_day(key) if by == "day" else key, count - refusals, refusals, int(prompt), int(generated))
        for key, count, refusals, prompt, generated in rows
    ]


def receipts(engine: Engine, user: str, request_id: str) -> list[Receipt]:
    """Of a user's requests with this X-Request-Id, in the order of their arrival: a client may use one again."""
    query = (
        select(Entry).where(Entry.user == user, Entry.request_id == request_id).order_by(Entry.arrived_at).limit(_MOST)
    )
    with Session(engine) as session:
        return [
            Receipt(**{name: getattr(row, name) for name in Receipt.__dataclass_fields__})
            for row in session.scalars(query)
        ]


def spent_tokens(engine: Engine, user: str, since: float) -> int:
    """Tokens billed to a user since then."""
    total = func.sum(Entry.prompt_tokens + Entry.generated_tokens)
    with Session(engine) as session:
        return int(session.scalar(select(total).where(*_between(user, since, None))) or 0)


def gaps(engine: Engine, since: float | None = None, until: float | None = None) -> list[Gap]:
    """Where the ledger may have holes."""
    query = select(Writer).where(Writer.gap).order_by(Writer.last_flush)
    with Session(engine) as session:
        found = [
            Gap(row.last_flush, row.ended or row.last_flush, row.open_requests, row.open_tokens, row.open_tokens_most)
            for row in session.scalars(query)
        ]
    return [gap for gap in found if (since is None or gap.until >= since) and (until is None or gap.since < until)]


def _between(user: str | None, since: float | None, until: float | None) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if user is not None:
        found.append(Entry.user == user)
    if since is not None:
        found.append(Entry.arrived_at >= since)
    if until is not None:
        found.append(Entry.arrived_at < until)
    return found


def _day(number: int) -> str:
    return datetime.fromtimestamp(number * _DAY_S, UTC).date().isoformat()
