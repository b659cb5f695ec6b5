import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Scope

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.app import METHODS
from synthia_vllm.gateway.request import Request
from tests.gateway.stack import Stack

CHAT = {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
PROTECTED = [path for path in METHODS if path not in ("/health", "/ready") and not path.endswith("/")]
NO_PAGE = JSONResponse({})


async def chat(stack: Stack, key: str | None = "sk-alice", **options: Any) -> httpx.Response:
    async with stack.client(key) as client:
        return await client.post("/v1/chat/completions", json={**CHAT, **options.pop("json", {})}, **options)


@pytest.mark.parametrize("path", [*PROTECTED, "/v1/models/synthia", "/admin/state", "/admin/keys"])
@pytest.mark.parametrize("key", [None, "sk-revoked"])
async def test_every_route_asks_for_a_key(path: str, key: str | None) -> None:
    engine = NullEnginePort()
    async with Stack(engine, admin=NO_PAGE, metrics=NO_PAGE).client(key) as client:
        reply = await client.request(METHODS.get(path, ("GET",))[0], path, content=b"{}")
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    error = reply.json()["error"]
    assert error["type"] == ("authentication_error" if path.startswith("/v1/messages") else "invalid_request_error")
    assert error.get("code", "invalid_api_key") == "invalid_api_key"
    assert not engine.seen


async def test_health_is_told_without_a_key() -> None:
    async with Stack(NullEnginePort()).client(None) as client:
        assert (await client.get("/health")).status_code == 200


async def test_a_route_that_is_not_there_is_404_for_everybody() -> None:
    for key in (None, "sk-alice", "sk-root"):
        async with Stack(NullEnginePort()).client(key) as client:
            assert (await client.get("/v1/load_lora_adapter")).status_code == 404


async def test_the_key_may_come_as_anthropics_header() -> None:
    stack = Stack(NullEnginePort())
    assert (await chat(stack, None, headers={"x-api-key": "sk-alice"})).status_code == 200
    assert stack.exchanges[0].account.user == "alice"


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "user"),
    [
        ("Bearer sk-revoked", "sk-alice", "alice"),
        ("Basic YTpi", "sk-alice", "alice"),
        ("Bearer ", "sk-alice", "alice"),
        ("Bearer sk-alice", "sk-revoked", "alice"),
        ("bearer   sk-alice", "", "alice"),
        ("Bearer sk-alice", "sk-small", "alice"),
        ("Bearer sk-revoked", "none", None),
        ("Bearer \xff", "\xff", None),
    ],
)
async def test_a_bad_key_beside_a_good_one_does_no_harm(authorization: str, x_api_key: str, user: str | None) -> None:
    stack = Stack(NullEnginePort())
    headers = {"authorization": authorization.encode("latin-1"), "x-api-key": x_api_key.encode("latin-1")}
    async with stack.client(None) as client:
        reply = await client.post("/v1/chat/completions", json=CHAT, headers=list(headers.items()))
    assert reply.status_code == (200 if user else 401)
    assert stack.exchanges[0].account.user == (user or "anonymous")


async def test_without_required_keys_a_known_key_still_names_the_user() -> None:
    stack = Stack(NullEnginePort(), keys_required=False)
    for key in ("sk-alice", "none", None):
        assert (await chat(stack, key)).status_code == 200
    assert [exchange.account.user for exchange in stack.exchanges] == ["alice", "anonymous", "anonymous"]


async def test_admin_keys_and_user_keys_open_different_doors() -> None:
    stack = Stack(NullEnginePort(), admin=JSONResponse({"state": 1}), metrics=JSONResponse({"metrics": 1}))
    assert (await chat(stack, "sk-root")).status_code == 403
    async with stack.client("sk-alice") as client:
        assert (await client.get("/admin/state")).status_code == 403
        assert (await client.get("/metrics")).status_code == 403
    async with stack.client("sk-root") as client:
        assert (await client.get("/admin/state")).json() == {"state": 1}
        assert (await client.get("/metrics")).json() == {"metrics": 1}


async def test_admin_needs_its_key_even_on_an_open_server() -> None:
    stack = Stack(NullEnginePort(), keys_required=False, admin=NO_PAGE)
    async with stack.client(None) as client:
        assert (await client.get("/admin/state")).status_code == 401


async def test_a_key_for_some_models_opens_no_other() -> None:
    stack = Stack(NullEnginePort())
    assert (await chat(stack, "sk-small")).status_code == 200
    refused = await chat(stack, "sk-small", json={"model": "synthia-tot"})
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "model"


async def test_the_request_id_is_echoed_and_the_engine_gets_one_of_its_own() -> None:
    engine = NullEnginePort()
    stack = Stack(engine)
    reply = await chat(stack, headers={"X-Request-Id": "mine"})
    again = await chat(stack, headers={"X-Request-Id": "mine"})
    assert reply.headers["x-request-id"] == again.headers["x-request-id"] == "mine"
    ids = [generation.id for generation in engine.seen]
    assert ids[0] != ids[1]
    assert all(one.startswith("mine-") for one in ids)
    assert stack.exchanges[0].id != stack.exchanges[1].id


@pytest.mark.parametrize("given", ["a\tb", "x" * 200, "<script>", "a b", ""])
async def test_a_request_id_that_could_do_harm_is_replaced(given: str) -> None:
    reply = await chat(Stack(NullEnginePort()), headers={"X-Request-Id": given})
    assert reply.status_code == 200
    assert reply.headers["x-request-id"] != given
    assert len(reply.headers["x-request-id"]) == 16


async def test_a_refusal_has_a_request_id_too_and_is_noted() -> None:
    stack = Stack(NullEnginePort())
    reply = await chat(stack, json={"messages": 5})
    assert reply.status_code == 400
    assert reply.headers["x-request-id"]
    exchange = stack.exchanges[0]
    assert (exchange.outcome, exchange.status, exchange.usage.billed_prompt) == ("rejected", 400, 0)


class Refusing:
    """A layer that lets nothing pass."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        raise self.error
        yield Delta()


async def test_errors_of_the_layers_below_are_answered_with_their_headers() -> None:
    stack = Stack(NullEnginePort(), between=lambda _: Refusing(Overloaded("full", 3.2)))
    reply = await chat(stack)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "4")
    assert (stack.exchanges[0].outcome, stack.exchanges[0].reason) == ("rejected", "overloaded")


async def test_what_breaks_below_is_a_failure() -> None:
    stack = Stack(NullEnginePort(), between=lambda _: Refusing(OSError("secret")))
    reply = await chat(stack)
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert (stack.exchanges[0].outcome, stack.exchanges[0].reason) == ("failed", "internal")
    assert not stack.access.open


async def test_a_process_that_ends_has_stopped_it() -> None:
    stack = Stack(NullEnginePort(tokens_per_second=10))
    task = asyncio.create_task(chat(stack))
    await asyncio.sleep(0.05)
    assert len(stack.access.open) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert stack.exchanges[0].outcome == "stopped"
    assert not stack.access.open


@pytest.mark.parametrize("value", ["-1", "0", "soon", "inf", "nan"])
async def test_a_queue_timeout_is_a_number_of_seconds(value: str) -> None:
    reply = await chat(Stack(NullEnginePort()), headers={"X-Queue-Timeout-S": value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "X-Queue-Timeout-S"


async def test_a_body_over_the_limit_is_refused() -> None:
    assert (await chat(Stack(NullEnginePort(), max_body_bytes=10))).status_code == 413


async def test_a_body_that_does_not_come_is_given_up() -> None:
    stack = Stack(NullEnginePort(), body_timeout=0.05)
    sent = []
    parts = iter([{"type": "http.request", "body": b'{"model":', "more_body": True}])

    async def receive() -> Any:
        for part in parts:
            return part
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"authorization", b"Bearer sk-alice")],
    }
    await stack.app(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_a_client_that_leaves_before_its_body_is_whole_is_answered_nothing() -> None:
    stack = Stack(NullEnginePort())

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"x-api-key", b"sk-alice")],
    }
    await stack.app(scope, receive, send)
    assert stack.exchanges[0].outcome == "cancelled"
