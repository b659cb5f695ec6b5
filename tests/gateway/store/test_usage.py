from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine

from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.usage import UsageRow, spent_tokens, usage
from tests.gateway.store.conftest import MakeExchange

MIDNIGHT = datetime(2027, 1, 31, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def rows(engine: Engine, make_exchange: MakeExchange) -> None:
    ledger = Ledger(engine)
    ledger.add(make_exchange("a", "alice", prompt=10, generated=1, arrived_at=MIDNIGHT - 0.001))
    ledger.add(make_exchange("b", "alice", prompt=20, generated=2, arrived_at=MIDNIGHT, model="synthia-tot"))
    ledger.add(make_exchange("c", "bob", prompt=40, generated=4, arrived_at=MIDNIGHT + 86_399.999))
    ledger.add(make_exchange("d", "bob", arrived_at=MIDNIGHT + 1, outcome="rejected", status=429, reason="tokens"))
    ledger.add(make_exchange("e", "bob", prompt=80, generated=8, arrived_at=MIDNIGHT + 86_400, outcome="cancelled"))
    ledger.close()


def test_by_user(engine: Engine) -> None:
    assert usage(engine) == [UsageRow("alice", 2, 0, 30, 3), UsageRow("bob", 2, 1, 120, 12)]


def test_by_day_in_utc(engine: Engine) -> None:
    assert usage(engine, by="day") == [
        UsageRow("2027-01-30", 1, 0, 10, 1),
        UsageRow("2027-01-31", 2, 1, 60, 6),
        UsageRow("2027-02-01", 1, 0, 80, 8),
    ]


def test_by_model(engine: Engine) -> None:
    assert usage(engine, by="model") == [UsageRow("synthia", 3, 1, 130, 13), UsageRow("synthia-tot", 1, 0, 20, 2)]


def test_of_one_user_in_a_span_that_excludes_its_end(engine: Engine) -> None:
    found = usage(engine, user="bob", since=MIDNIGHT, until=MIDNIGHT + 86_400)
    assert found == [UsageRow("bob", 1, 1, 40, 4)]


def test_of_nobody(engine: Engine) -> None:
    assert usage(engine, user="carol") == []


def test_spent_tokens_since(engine: Engine) -> None:
    assert spent_tokens(engine, "alice", 0) == 33
    assert spent_tokens(engine, "alice", MIDNIGHT) == 22
    assert spent_tokens(engine, "carol", 0) == 0
