from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.routes import ROUTES
from tests.gateway.stack import ScriptedEngine, Stack

CHAT = {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}]}
PROTECTED = [path for path in ROUTES if path not in ("/health", "/ready")]


async def chat(stack: Stack, key: str | None = "sk-alice", **options: Any) -> httpx.Response:
    async with stack.client(key) as client:
        return await client.post("/v1/chat/completions", json={**CHAT, **options.pop("json", {})}, **options)


@pytest.mark.parametrize("path", [*PROTECTED, "/admin/state", "/admin/keys"])
@pytest.mark.parametrize("key", [None, "sk-revoked"])
async def test_every_route_asks_for_a_key(path: str, key: str | None) -> None:
    engine = ScriptedEngine()
    async with Stack(engine, admin=JSONResponse({})).client(key) as client:
        reply = await client.request(ROUTES.get(path, "GET"), path, json={})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["type"] == "authentication_error"
    assert not engine.seen


async def test_health_is_told_without_a_key() -> None:
    async with Stack(JSONResponse({})).client(None) as client:
        assert (await client.get("/health")).status_code == 200


async def test_a_route_that_is_not_there_is_404_for_everybody() -> None:
    for key in (None, "sk-alice", "sk-root"):
        async with Stack(ScriptedEngine()).client(key) as client:
            assert (await client.get("/v1/load_lora_adapter")).status_code == 404


async def test_the_key_may_come_as_anthropics_header() -> None:
    stack = Stack(ScriptedEngine())
    assert (await chat(stack, None, headers={"x-api-key": "sk-alice"})).status_code == 200
    assert stack.calls[0].account.user == "alice"


async def test_without_required_keys_a_known_key_still_names_the_user() -> None:
    stack = Stack(ScriptedEngine(), keys_required=False)
    for key in ("sk-alice", "none", None):
        assert (await chat(stack, key)).status_code == 200
    assert [call.account.user for call in stack.calls] == ["alice", "anonymous", "anonymous"]


async def test_admin_keys_and_user_keys_open_different_doors() -> None:
    stack = Stack(ScriptedEngine(), admin=JSONResponse({"state": 1}))
    assert (await chat(stack, "sk-root")).status_code == 403
    async with stack.client("sk-alice") as client:
        assert (await client.get("/admin/state")).status_code == 403
        assert (await client.get("/metrics")).status_code == 403
    async with stack.client("sk-root") as client:
        assert (await client.get("/admin/state")).json() == {"state": 1}


async def test_admin_needs_its_key_even_on_an_open_server() -> None:
    stack = Stack(ScriptedEngine(), keys_required=False, admin=JSONResponse({}))
    async with stack.client(None) as client:
        assert (await client.get("/admin/state")).status_code == 401


async def test_a_key_for_some_models_opens_no_other() -> None:
    stack = Stack(ScriptedEngine())
    assert (await chat(stack, "sk-small")).status_code == 200
    refused = await chat(stack, "sk-small", json={"model": "synthia-tot"})
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "model"


async def test_the_request_id_is_echoed_and_upstream_gets_one_of_its_own() -> None:
    engine = ScriptedEngine()
    stack = Stack(engine)
    reply = await chat(stack, headers={"X-Request-Id": "mine"})
    again = await chat(stack, headers={"X-Request-Id": "mine"})
    assert reply.headers["x-request-id"] == again.headers["x-request-id"] == "mine"
    ids = [headers[b"x-request-id"] for headers in engine.headers]
    assert ids[0] != ids[1]
    assert all(one.startswith(b"mine-") for one in ids)
    assert stack.calls[0].id != stack.calls[1].id


@pytest.mark.parametrize("given", ["a\tb", "x" * 200, "<script>", "a b", ""])
async def test_a_request_id_that_could_do_harm_is_replaced(given: str) -> None:
    reply = await chat(Stack(ScriptedEngine()), headers={"X-Request-Id": given})
    assert reply.status_code == 200
    assert reply.headers["x-request-id"] != given
    assert len(reply.headers["x-request-id"]) == 16


async def test_keys_never_go_upstream() -> None:
    engine = ScriptedEngine()
    await chat(Stack(engine), headers={"x-api-key": "sk-alice", "cookie": "a=b"})
    assert not {b"authorization", b"x-api-key", b"cookie"} & engine.headers[0].keys()


async def test_a_refusal_has_a_request_id_too_and_is_noted() -> None:
    stack = Stack(ScriptedEngine())
    reply = await chat(stack, json={"messages": 5})
    assert reply.status_code == 400
    assert reply.headers["x-request-id"]
    assert (stack.calls[0].outcome, stack.calls[0].status, stack.calls[0].billed_prompt) == ("rejected", 400, 0)


async def test_errors_of_the_layers_below_are_answered_with_their_headers() -> None:
    def refusing(app: Any) -> Any:
        async def layer(scope: Scope, receive: Receive, send: Send) -> None:
            raise Overloaded("full", 3.2)

        return layer

    stack = Stack(ScriptedEngine(), between=refusing)
    reply = await chat(stack)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "4")
    assert stack.calls[0].reason == "overloaded"


async def test_an_upstream_that_breaks_is_a_failure() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("gone")

    stack = Stack(broken)
    assert (await chat(stack)).status_code == 500
    assert stack.calls[0].outcome == "failed"
    assert not stack.access.open


@pytest.mark.parametrize("value", ["-1", "0", "soon", "inf", "nan"])
async def test_a_queue_timeout_is_a_number_of_seconds(value: str) -> None:
    reply = await chat(Stack(ScriptedEngine()), headers={"X-Queue-Timeout-S": value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "X-Queue-Timeout-S"


async def test_a_body_over_the_limit_is_refused() -> None:
    reply = await chat(Stack(ScriptedEngine(), max_body_bytes=10))
    assert reply.status_code == 413


async def test_a_body_that_does_not_come_is_given_up() -> None:
    stack = Stack(ScriptedEngine(), body_timeout=0.05)

    async def trickle() -> Any:
        yield b'{"model":'
        import asyncio

        await asyncio.sleep(30)

    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"authorization", b"Bearer sk-alice")],
    }
    parts = trickle()
    sent = []

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(parts), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    await stack.app(scope, receive, send)
    assert sent[0]["status"] == 408
