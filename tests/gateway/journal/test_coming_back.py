"""A client that comes back gets the rest, to the byte, wherever its connection broke; and the bill has each token once.

Two gateways with one Redis and one database, before engines that say the same to the same prompt.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.journal.entry import Entry
from synthia_vllm.gateway.request import Usage
from tests.gateway.asgi import Answer
from tests.gateway.whole import BODIES, CHAT, COMPLETIONS, GENERATING, LENGTH, RESPONSES, House, house

TEXT = "An orca 🐋 is a\ntoothed whale. It éats fish — USER"
ANSWERED = "x-request-id"
some = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class Pair:
    """Two gateways before one engine each."""

    first: House
    second: House

    @property
    def both(self) -> tuple[House, House]:
        return self.first, self.second

    def bill(self, user: str = "alice") -> list[tuple[int, int]]:
        """The rows, of prompts' and generated tokens, in the order of their arrival."""
        self.billed(user)
        return [(row.prompt_tokens, row.generated_tokens) for row in self.first.bill(user)]

    def billed(self, user: str = "alice") -> tuple[int, int]:
        for one in self.both:
            one.gateway.ledger.flush()
        return self.first.billed(user)

    async def rest(self) -> None:
        for one in self.both:
            await one.rest()


@asynccontextmanager
async def pair(
    folder: Path, redis_url: str, *, timeouts: dict[str, float] | None = None, **engine: Any
) -> AsyncIterator[Pair]:
    settings: dict[str, Any] = {"limits": {"redis": redis_url}, "timeouts": timeouts or {}}
    async with (
        house(folder, NullEnginePort(**engine), **settings) as first,
        house(folder, NullEnginePort(**engine), **settings) as second,
    ):
        second.keys = first.keys
        yield Pair(first, second)


def events_of(body: bytes) -> list[tuple[str, bytes]]:
    """Each event's id and all else of it."""
    found = []
    for event in body.split(b"\n\n")[:-1]:
        lines = event.split(b"\n")
        assert lines[0].startswith(b"id: "), event
        found.append((lines[0][4:].decode(), b"\n".join(lines[1:])))
    return found


_OWN_ID = re.compile(rb'"(?:chatcmpl-|cmpl-|resp_|msg_)([0-9a-z-]+)"')
_CREATED = re.compile(rb'"created(?:_at)?":\d+')


def without_own(events: list[tuple[str, bytes]]) -> list[bytes]:
    """The events without what each reply has of its own: its id, and when it began; it is the same in all of them."""
    found = [data for _, data in events]
    assert len({one for data in found for one in _OWN_ID.findall(data)}) <= 1
    return [_CREATED.sub(b"", _OWN_ID.sub(b"", data)) for data in found]


async def cut(house: House, path: str, body: dict[str, Any], tokens: int, name: str, *, dies: bool = False) -> Answer:
    """Asks for a stream, and goes when the engine has generated so many more tokens; so does the gateway if it dies."""
    leave, before = asyncio.Event(), house.engine.generated
    asking = asyncio.create_task(house.post("alice", path, body, headers={ANSWERED: name}, leave=leave))
    while house.engine.generated < before + tokens and not asking.done():
        await asyncio.sleep(0)
    journals = house.gateway.journals
    assert journals is not None
    generates = bool(journals._open)  # else its row may be in the ledger's queue, where death takes it
    with silenced(house) if dies and generates and not asking.done() else contextlib.nullcontext():
        leave.set()
        return await asking


@contextmanager
def silenced(house: House) -> Iterator[None]:
    """A gateway that says nothing, as a dead one: neither to Redis nor to the database."""
    journals, limiter, ledger = house.gateway.journals, house.gateway.limiter, house.gateway.ledger
    assert journals is not None

    async def closed(entry: Entry, usage: Usage) -> None:
        journals._open.pop(entry, None)

    async def settled(user: str, call_id: str, tokens: int) -> None:
        pass

    with (
        mock.patch.object(journals, "close", closed),
        mock.patch.object(limiter, "settle", settled),
        mock.patch.object(ledger, "ended"),
    ):
        yield


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("path", GENERATING)
def test_the_rest_of_a_stream_is_the_same_as_without_a_cut(
    path: str, dies: bool, tmp_path: Path, redis_url: str
) -> None:
    async def check(gateways: Pair, body: dict[str, Any], tokens: int, part: float) -> None:
        name = uuid4().hex
        before = gateways.billed()
        undisturbed = await gateways.first.post("alice", path, body, headers={ANSWERED: f"whole-{name}"})
        wanted, whole = events_of(undisturbed.body), gateways.billed()
        broken = await cut(gateways.first, path, body, tokens, name, dies=dies)
        got = events_of(broken.body)
        got = got[: round(part * len(got))]  # the rest was lost on the way
        headers = {ANSWERED: name, "Last-Event-ID": got[-1][0] if got else "*"}
        again = await gateways.second.post("alice", path, body, headers=headers)
        assert again.status == 200, again.body
        found = got + events_of(again.body)
        assert without_own(found) == without_own(wanted)
        await gateways.rest()
        twice = tuple(2 * now - then for then, now in zip(before, whole, strict=True))
        assert gateways.billed() == twice

    with asyncio.Runner() as runner:
        context = pair(tmp_path, redis_url)
        gateways = runner.run(context.__aenter__())

        @some
        @given(
            tokens=st.integers(0, 24),
            length=st.integers(1, 40),
            text=st.sampled_from([None, TEXT]),
            more=st.sampled_from([{}, {"stream_interval": 3}, {"seed": 7}]),
            stop=st.sampled_from([{}, {}, {"stop": [" is"]}, {"stop": ["zzz"]}]),
            part=st.floats(0, 1),
        )
        def examples(
            tokens: int, length: int, text: str | None, more: dict[str, Any], stop: dict[str, Any], part: float
        ) -> None:
            for one in gateways.both:
                one.engine.text = text
            own = {**BODIES[path], LENGTH[path]: length, "stream": True, **more}
            runner.run(check(gateways, own | (stop if path in (CHAT, COMPLETIONS) else {}), tokens, part))

        try:
            examples()
        finally:
            runner.run(context.__aexit__(None, None, None))


async def test_who_comes_back_while_the_gateway_still_generates_takes_it_over(tmp_path: Path, redis_url: str) -> None:
    async with pair(tmp_path, redis_url, tokens_per_second=50) as gateways:
        first, second = gateways.both
        body = {**BODIES[COMPLETIONS], "max_tokens": 60, "stream": True}
        asking = asyncio.create_task(first.post("alice", COMPLETIONS, body, headers={ANSWERED: "one"}))
        while first.engine.generated < 20:
            await asyncio.sleep(0.01)
        headers = {ANSWERED: "one", "Last-Event-ID": "*"}
        again = await second.post("alice", COMPLETIONS, body, headers=headers)
        left = await asyncio.wait_for(asking, 5)
        await gateways.rest()
        assert len(again.events()) >= 60
        assert first.engine.generated < 60
        assert left.tokens < 60
        before, after = gateways.bill()
        assert before == (0, 0)
        assert after[0] > 0
        assert after[1] == 60
        receipts = (await second.get("alice", "/v1/usage/one")).json()["data"]
        assert sorted(one["generated_tokens"] for one in receipts) == [0, 60]


@pytest.mark.parametrize("name", ["given", None])
async def test_a_whole_reply_goes_on_by_its_name(tmp_path: Path, redis_url: str, name: str | None) -> None:
    async with pair(tmp_path, redis_url, tokens_per_second=200) as gateways:
        first, second = gateways.both
        body = {**BODIES[CHAT], "max_tokens": 60}
        headers = {ANSWERED: name} if name else {}
        leave = asyncio.Event()
        asking = asyncio.create_task(first.post("alice", CHAT, body, headers=headers, leave=leave))
        while first.engine.generated < 30:
            await asyncio.sleep(0.01)
        leave.set()
        await asking
        again = (await second.post("alice", CHAT, body, headers=headers)).json()
        await gateways.rest()
        assert again["usage"]["completion_tokens"] == 60
        generated = [tokens for _, tokens in gateways.bill()]
        assert sum(generated) == (60 if name else generated[0] + 60)
        assert second.engine.generated < 60 if name else second.engine.generated == 60
        # What was delivered is another's no longer: the same question is a new one.
        third = (await second.post("alice", CHAT, body, headers=headers)).json()
        assert third["id"] != again["id"]
        assert gateways.billed()[1] == sum(generated) + 60


async def test_two_requests_of_one_name_at_once_are_two(tmp_path: Path, redis_url: str) -> None:
    async with pair(tmp_path, redis_url, tokens_per_second=100) as gateways:
        body = {**BODIES[CHAT], "max_tokens": 30}
        for streamed in (False, True):
            asked = [
                one.post("alice", CHAT, {**body, "stream": streamed}, headers={ANSWERED: "same"})
                for one in (*gateways.both, gateways.first)
            ]
            replies = await asyncio.gather(*asked)
            assert [one.status for one in replies] == [200] * 3
        await gateways.rest()
        assert gateways.billed()[1] == 6 * 30


@pytest.mark.parametrize(
    ("change", "headers", "status", "code"),
    [
        ({"max_tokens": 7}, {}, 410, "reply_not_kept"),
        ({}, {ANSWERED: "never"}, 410, "reply_not_kept"),
        ({}, {"Last-Event-ID": "ten"}, 400, None),
        ({}, {"Last-Event-ID": "0.999999999"}, 400, None),
        ({}, {"Last-Event-ID": "0." + ".".join(["1"] * 40)}, 400, None),
        ({}, {"x-api-key": "bob"}, 410, "reply_not_kept"),
        ({}, {ANSWERED: ""}, 410, "reply_not_kept"),
    ],
)
async def test_a_rest_that_is_not_there_is_refused(
    tmp_path: Path, redis_url: str, change: dict[str, Any], headers: dict[str, str], status: int, code: str | None
) -> None:
    async with pair(tmp_path, redis_url, tokens_per_second=100) as gateways:
        body = {**BODIES[CHAT], "max_tokens": 30, "stream": True}
        await cut(gateways.first, CHAT, body, 10, "one")
        user = headers.pop("x-api-key", "alice")
        given = {ANSWERED: "one", "Last-Event-ID": "0", **headers}
        reply = await gateways.second.post(user, CHAT, {**body, **change}, headers=given)
        assert (reply.status, reply.json()["error"]["code"]) == (status, code)
        assert gateways.second.engine.generated == 0
        # What was refused took nothing away.
        given = {ANSWERED: "one", "Last-Event-ID": "0"}
        assert (await gateways.second.post("alice", CHAT, body, headers=given)).status == 200


async def test_a_gateway_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    async with house(tmp_path) as alone:
        reply = await alone.post("alice", CHAT, headers={"Last-Event-ID": "3"})
        assert (reply.status, reply.json()["error"]["code"]) == (410, "reply_not_kept")
        assert "--limits.redis" in reply.json()["error"]["message"]


async def test_without_a_name_nothing_is_kept_and_events_are_as_ever(tmp_path: Path, redis_url: str) -> None:
    async with pair(tmp_path, redis_url) as gateways:
        reply = await gateways.first.post("alice", CHAT, {**BODIES[CHAT], "stream": True})
        assert reply.body.startswith(b"data: ")
        assert b"\nid: " not in reply.body
        assert not list(redis.Redis.from_url(redis_url).scan_iter("*reply*"))


async def test_a_redis_that_is_gone_refuses_a_rest_and_nothing_else(tmp_path: Path) -> None:
    async with pair(tmp_path, "redis://127.0.0.1:1", timeouts={"redis": 1.0}) as gateways:
        for streamed in (False, True):
            reply = await gateways.first.post(
                "alice", CHAT, {**BODIES[CHAT], "stream": streamed}, headers={ANSWERED: "a"}
            )
            assert reply.status == 200
        reply = await gateways.second.post("alice", CHAT, headers={ANSWERED: "a", "Last-Event-ID": "0"})
        assert (reply.status, reply.headers[b"retry-after"]) == (503, b"1")
    assert gateways.first.billed("alice")[1] == 10


async def test_replies_with_more_than_ids_have_no_event_ids(tmp_path: Path, redis_url: str) -> None:
    async with pair(tmp_path, redis_url) as gateways:
        for more in ({"n": 2}, {"logprobs": True}):
            body = {**BODIES[CHAT], "stream": True, **more}
            reply = await gateways.first.post("alice", CHAT, body, headers={ANSWERED: "x"})
            assert b"id: " not in reply.body.replace(b'"id": ', b"")
            again = await gateways.second.post("alice", CHAT, body, headers={ANSWERED: "x", "Last-Event-ID": "0"})
            assert again.status == 410


async def test_what_a_dead_gateway_had_reserved_holds_nobody_up(tmp_path: Path, redis_url: str) -> None:
    """One request at once: the lease of the dead one's would last for half a minute."""
    async with pair(tmp_path, redis_url, tokens_per_second=100) as gateways:
        first, second = gateways.both
        first.let_in("alice", concurrent_requests=1, tokens_per_minute=200)
        body = {**BODIES[RESPONSES], "max_output_tokens": 60, "stream": True}
        await cut(first, RESPONSES, body, 20, "one", dies=True)
        other = await second.post("alice", CHAT, headers={ANSWERED: "two"})
        assert other.status == 429
        again = await second.post("alice", RESPONSES, body, headers={ANSWERED: "one", "Last-Event-ID": "*"})
        assert again.status == 200
        await second.rest()
        standing = await second.standing("alice")
        assert standing.concurrent_requests == 0
        assert standing.tokens_last_minute == sum(gateways.billed())


async def test_replies_expire(tmp_path: Path, redis_url: str) -> None:
    async with pair(tmp_path, redis_url, timeouts={"reply_kept": 1}) as gateways:
        body = {**BODIES[CHAT], "stream": True}
        await gateways.first.post("alice", CHAT, body, headers={ANSWERED: "one"})
        keys = redis.Redis.from_url(redis_url)
        assert list(keys.scan_iter("*reply*"))
        async with asyncio.timeout(10):
            while list(keys.scan_iter("*reply*")):
                await asyncio.sleep(0.1)
        reply = await gateways.second.post("alice", CHAT, body, headers={ANSWERED: "one", "Last-Event-ID": "0"})
        assert reply.status == 410
