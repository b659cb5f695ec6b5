"""`/v1/usage`, of a whole gateway before an engine that does nothing: everyone sees his own, and nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, inspect

from synthia_vllm.gateway.store.database import open_database
from tests.gateway.whole import CHAT, House, house


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as found:
        yield found


async def told(home: House, user: str, path: str = "/v1/usage") -> Any:
    home.gateway.ledger.flush()
    return (await home.get(user, path)).json()


async def test_a_user_sees_what_he_is_billed_for_and_nobody_elses(home: House) -> None:
    for user, count in (("alice", 3), ("bob", 1)):
        for _ in range(count):
            assert (await home.post(user, CHAT)).status == 200
    for user, count in (("alice", 3), ("bob", 1)):
        prompt, generated = home.billed(user)
        found = await told(home, user)
        today = datetime.now(UTC).date().isoformat()
        row = {"name": today, "requests": count, "refused": 0, "prompt_tokens": prompt, "generated_tokens": generated}
        assert found == {"object": "list", "user": user, "by": "day", "data": [row]}
        (row,) = (await told(home, user, "/v1/usage?by=model"))["data"]
        assert (row["name"], row["prompt_tokens"], row["generated_tokens"]) == ("synthia", prompt, generated)
    assert (await told(home, "alice", "/v1/usage?since=2001-01-01&until=2001-01-02"))["data"] == []


async def test_each_request_has_a_receipt(home: House) -> None:
    reply = await home.post("alice", CHAT)
    mine = reply.headers[b"x-request-id"].decode()
    (one,) = (await told(home, "alice", f"/v1/usage/{mine}"))["data"]
    usage = reply.json()["usage"]
    assert (one["prompt_tokens"], one["generated_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (one["route"], one["status"], one["outcome"], one["model"]) == (CHAT, 200, "finished", "synthia")
    assert abs(one["arrived_at"] - time.time()) < 3600
    assert one["duration"] >= one["queue_wait"] >= 0
    assert one["time_to_first_token"] is None, "of a whole reply"
    assert "key_id" not in one


async def test_a_name_that_is_used_again_has_a_receipt_for_each(home: House) -> None:
    named = {"x-request-id": "mine"}
    await asyncio.gather(*(home.post("alice", CHAT, headers=named) for _ in range(3)))
    await home.post("bob", CHAT, headers=named)
    found = (await told(home, "alice", "/v1/usage/mine"))["data"]
    assert len({one["id"] for one in found}) == 3
    assert len((await told(home, "bob", "/v1/usage/mine"))["data"]) == 1


async def test_another_users_receipt_is_none(home: House) -> None:
    reply = await home.post("bob", CHAT)
    home.gateway.ledger.flush()
    for name in (reply.headers[b"x-request-id"].decode(), "never", "a%2Fb", "x" * 161, "%00", "%", "'--", "é"):
        found = await home.get("alice", f"/v1/usage/{name}")
        assert found.status in (400, 404), name
        assert found.json()["error"]["type"] == "invalid_request_error"


async def test_who_has_no_key_or_an_admins_is_refused(home: House) -> None:
    home.keys["ops"] = home.gateway.keys.create("ops", admin=True)[1]
    for path in ("/v1/usage", "/v1/usage/mine"):
        assert (await home.get("nobody", path)).status == 401
        assert (await home.get("ops", path)).status == 403


async def test_asking_counts_as_a_request(home: House) -> None:
    home.let_in("carol", requests_per_minute=2)
    statuses = [(await home.get("carol", "/v1/usage")).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    by=st.sampled_from(["day", "model", "user", "", "x"]),
    since=st.none() | st.text(max_size=30) | st.datetimes().map(datetime.isoformat),
    until=st.none() | st.text(max_size=30),
)
async def test_whatever_is_asked_is_answered_or_refused_by_name(
    home: House, by: str, since: str | None, until: str | None
) -> None:
    given_ = {name: value for name, value in (("by", by), ("since", since), ("until", until)) if value is not None}
    query = str(httpx.QueryParams({name: value.encode("utf-8", "replace").decode() for name, value in given_.items()}))
    reply = await home.get("alice", f"/v1/usage?{query}")
    assert reply.status in (200, 400), reply
    if reply.status == 400:
        assert reply.json()["error"]["param"] in given_


def test_receipts_are_found_by_an_index(tmp_path: Path) -> None:
    """Else each look would go through all that a user ever asked."""
    open_database(f"sqlite:///{tmp_path}/keys.db").dispose()
    names = {index["name"] for index in inspect(create_engine(f"sqlite:///{tmp_path}/keys.db")).get_indexes("ledger")}
    assert "ix_ledger_user_request_id" in names
