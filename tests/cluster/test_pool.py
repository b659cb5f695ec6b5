"""The pool in front of null engines (no model), over real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.null_engine import NullEngine
from benchmarks.null_faults import Faults
from benchmarks.null_tokens import expected
from synthia_vllm.cluster.pool import ReplicaPool
from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.contract import Contract
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.forwarding import answer_lifespan, whole_body
from synthia_vllm.settings import ClusterSettings
from tests.gateway.live import serving
from tests.gateway.stack import Stack

CHAT = {"model": "null", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "stream": True}
TEXT = {"model": "null", "prompt": "hi", "max_tokens": 12, "stream": True}
Live = Callable[[ASGIApp], str]


@pytest.fixture
def live() -> Iterator[Live]:
    with ExitStack() as stack:
        yield lambda app: f"http://127.0.0.1:{stack.enter_context(serving(app))}"


@asynccontextmanager
async def pool_of(*urls: str, **options: Any) -> AsyncIterator[ReplicaPool]:
    """All of them up."""
    options = {"canary_period_s": 0.3, "canary_deadline_s": 1.0, "slow_start_s": 0, "handover_s": 0.2} | options
    async with ReplicaPool(ClusterSettings(**options), read_timeout=20) as pool:
        pool.update({f"r{number}": url for number, url in enumerate(urls)})
        await until(lambda: len(pool.up()) == len(urls))
        yield pool


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def client(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://pool", headers={"Authorization": "Bearer sk-alice"})


def words(body: str) -> list[str]:
    """The texts of a stream's chunks."""
    found = []
    for line in body.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                text = choice["delta"].get("content") if "delta" in choice else choice["text"]
                found += [text] if text else []
    return found


async def post(app: ASGIApp, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    async with client(app) as http:
        return await http.post(path, json=body, headers=headers)


class Answers:
    """A replica that lives, has no ids, and answers what it is told."""

    def __init__(self, answer: ASGIApp) -> None:
        self.answer = answer
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await answer_lifespan(receive, send)
        body = await whole_body(receive)
        if scope["path"] == "/v1/models":
            return await JSONResponse({"data": [{"id": "null", "max_model_len": 64}]})(scope, receive, send)
        if b'"prompt":[1]' in (body or b"").replace(b" ", b"") or scope["path"] == "/metrics":
            return await JSONResponse({})(scope, receive, send)
        self.asked += 1
        return await self.answer(scope, receive, send)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
@pytest.mark.parametrize("cut", [1, 2, 7, 12])
async def test_a_stream_goes_on_from_another_replica(live: Live, path: str, body: dict[str, Any], cut: int) -> None:
    engines = [NullEngine(faults=Faults(break_after=cut)), NullEngine()]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        replies = [(await post(Stack(pool).app, path, body)).text for _ in range(2)]
    assert sum(engine.resumed for engine in engines) == (1 if cut > 1 else 0)
    for reply in replies:
        assert "".join(words(reply)).strip() == "".join(expected(body, 12)).strip()
        assert reply.count("data: [DONE]") == 1


async def test_whole_replies_are_asked_for_anew(live: Live) -> None:
    broken = Answers(_breaks)
    async with pool_of(live(broken), live(NullEngine()), routing="round_robin") as pool:
        replies = [await post(pool, "/v1/completions", {**TEXT, "stream": False}) for _ in range(2)]
    assert broken.asked == 1
    assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [12, 12]


async def test_a_bill_counts_each_token_once(live: Live) -> None:
    engines = [NullEngine(faults=Faults(break_after=5)), NullEngine()]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        stack = Stack(pool)
        for _ in range(2):
            await post(stack.app, "/v1/chat/completions", CHAT)
    assert [call.generated for call in stack.calls] == [12, 12]
    assert sorted(call.resumes for call in stack.calls) == [0, 1]
    assert len({call.prompt_tokens for call in stack.calls}) == 1


async def test_an_error_of_a_replica_is_tried_elsewhere_and_passed_on_in_the_end(live: Live) -> None:
    failing = Answers(PlainTextResponse("no", 500))
    async with pool_of(live(failing), live(NullEngine()), routing="round_robin") as pool:
        replies = [await post(pool, "/v1/completions", TEXT) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [200, 200]
        assert failing.asked == 1
    async with pool_of(live(failing)) as pool:
        assert (await post(pool, "/v1/completions", TEXT)).status_code == 500


async def test_no_more_than_two_replicas_are_asked_by_a_request_that_fails(live: Live) -> None:
    failing = [Answers(PlainTextResponse("no", 500)) for _ in range(4)]
    async with pool_of(*map(live, failing)) as pool:
        reply = await post(pool, "/v1/completions", TEXT)
    assert reply.status_code == 500
    assert sum(replica.asked for replica in failing) == 2


async def test_a_busy_replica_is_no_lost_one(live: Live) -> None:
    busy = [Answers(PlainTextResponse("backpressure", 503)) for _ in range(3)]
    async with pool_of(*map(live, busy), live(NullEngine())) as pool:
        replies = [await post(pool, "/v1/completions", TEXT) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200] * 4


async def test_a_clients_error_is_passed_on_at_once(live: Live) -> None:
    replicas = [Answers(JSONResponse({"error": {"message": "too long"}}, 400)) for _ in range(2)]
    async with pool_of(*map(live, replicas)) as pool:
        reply = await post(pool, "/v1/completions", TEXT)
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "too long")
    assert sum(replica.asked for replica in replicas) == 1


@pytest.mark.parametrize(
    ("path", "body", "event"),
    [
        ("/v1/completions", {**TEXT, "n": 2}, 'data: {"error":{"message":"its replica was lost'),
        ("/v1/messages", {**CHAT}, 'event: error\ndata: {"type":"error","error":{"type":"api_error"'),
        ("/v1/responses", {**TEXT}, 'event: error\ndata: {"type":"error","code":"502"'),
    ],
)
async def test_what_cannot_go_on_ends_with_one_error_in_the_band(
    live: Live, path: str, body: dict[str, Any], event: str
) -> None:
    broken = [Answers(_breaks_in_stream) for _ in range(2)]
    async with pool_of(*map(live, broken)) as pool:
        sent = await gather(pool, path, body)
    assert sent.count(event) == 1
    assert "[DONE]" not in sent
    assert sum(replica.asked for replica in broken) == 1


async def test_who_comes_while_there_is_no_replica_waits_and_is_told(live: Live) -> None:
    async with pool_of() as pool:
        asked = asyncio.create_task(post(Contract(pool), "/v1/chat/completions", CHAT))
        await asyncio.sleep(2.5)
        assert not asked.done()
        assert pool.waiting == 1
        pool.update({"late": live(NullEngine())})
        reply = await asked
    assert reply.text.startswith(": waiting for a replica, 2 s so far\n\n")
    assert "".join(words(reply.text)) == "".join(expected(CHAT, 12)).strip()


async def test_waiting_has_an_end() -> None:
    async with pool_of(start_wait_s=0.1) as pool:
        plain = await post(Stack(pool).app, "/v1/completions", {**TEXT, "stream": False})
        assert (plain.status_code, plain.json()["error"]["type"]) == (503, "overloaded_error")
        assert (await post(Stack(pool).app, "/v1/completions", TEXT)).status_code == 503


async def test_what_generates_nothing_does_not_wait() -> None:
    async with pool_of() as pool, client(Stack(pool).app) as http:
        assert (await http.get("/v1/models")).status_code == 503


async def test_ready_means_that_a_replica_generated_a_token(live: Live) -> None:
    engine = NullEngine()
    async with pool_of(live(engine)) as pool, client(pool) as http:
        assert (await http.get("/ready")).status_code == 200
        engine.faults.dead = True
        await until(lambda: not pool.up())
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        engine.faults.dead = False
        await until(lambda: bool(pool.up()))


async def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind(live: Live) -> None:
    async with pool_of() as pool:
        waiting = [asyncio.create_task(post(Stack(pool).app, "/v1/completions", TEXT)) for _ in range(3)]
        await until(lambda: pool.waiting == 3)
        for task in waiting[:2]:
            task.cancel()
        await until(lambda: pool.waiting == 1)
        pool.update({"late": live(NullEngine())})
        await waiting[2]
        assert [view.in_flight for view in pool.replicas()] == [0]


async def test_streams_of_a_replica_that_is_to_stop_move_on(live: Live) -> None:
    engines = [NullEngine(tokens_per_second=10), NullEngine(tokens_per_second=10)]
    urls = [live(engine) for engine in engines]
    async with pool_of(*urls) as pool:
        streams = [asyncio.create_task(post(pool, "/v1/completions", {**TEXT, "prompt": f"{n}"})) for n in range(8)]
        await until(lambda: engines[0].running + engines[1].running == 8)
        moved = engines[0].running
        pool.update({"r1": urls[1]})
        replies = await asyncio.gather(*streams)
        assert [view.name for view in pool.replicas()] == ["r1"]
    assert moved > 0
    assert engines[1].resumed == moved
    for number, reply in enumerate(replies):
        assert words(reply.text) == expected({"prompt": f"{number}"}, 12)


async def test_streams_stay_on_a_replica_that_is_to_stop_while_there_is_no_other(live: Live) -> None:
    engine = NullEngine(tokens_per_second=20)
    async with pool_of(live(engine)) as pool:
        stream = asyncio.create_task(post(pool, "/v1/completions", TEXT))
        await until(lambda: engine.running == 1)
        pool.update({})
        assert words((await stream).text) == expected(TEXT, 12)
        assert (engine.resumed, pool.replicas()) == (0, [])


async def test_a_new_replica_gets_a_few_requests_first(live: Live) -> None:
    engine = NullEngine(tokens_per_second=1)
    async with pool_of(slow_start_s=600, canary_deadline_s=5) as pool:
        asked = [asyncio.create_task(post(pool, "/v1/completions", {**TEXT, "prompt": f"{n}"})) for n in range(40)]
        await until(lambda: pool.waiting == 40)
        pool.update({"new": live(engine)})
        await until(lambda: engine.running >= 8)
        await asyncio.sleep(0.5)
        assert engine.running < 16
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_capacity_is_what_the_replicas_hold_together(live: Live) -> None:
    told: list[Capacity] = []
    urls = [live(NullEngine()), live(NullEngine())]
    async with pool_of() as pool:
        pool.on_capacity = told.append
        pool.update({"a": urls[0]})
        await until(lambda: len(pool.up()) == 1)
        pool.update({"a": urls[0], "b": urls[1]})
        await until(lambda: len(pool.up()) == 2)
        pool.update({"b": urls[1]})
        pool.update({})
    assert [capacity.tokens for capacity in told if capacity.tokens] == [65536, 131072, 65536]
    assert told[-1].tokens is None  # who comes now waits in the pool


async def test_the_replicas_key_goes_to_them_and_the_clients_does_not(live: Live) -> None:
    seen: list[bytes] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"])[b"authorization"])
        await JSONResponse({})(scope, receive, send)

    async with ReplicaPool(ClusterSettings(), key="secret") as pool:
        pool.update({"r": live(Answers(answer))})
        await until(lambda: bool(pool.up()))
        await post(pool, "/v1/completions", TEXT)
    assert set(seen) == {b"Bearer secret"}


async def gather(app: ASGIApp, path: str, body: dict[str, Any]) -> str:
    """What was sent of a reply that ends in an exception, as httpx does not tell it."""
    sent = b""
    pending = [json.dumps(body).encode()]

    async def receive() -> Any:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal sent
        sent += message.get("body", b"")

    with pytest.raises(RequestError):
        await app({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    return sent.decode()


async def _breaks(scope: Scope, receive: Receive, send: Send) -> None:
    raise ConnectionResetError("as ordered")


async def _breaks_in_stream(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b'data: {"choices":[]}\n\n', "more_body": True})
    await asyncio.sleep(0.1)
    raise ConnectionResetError("as ordered")
