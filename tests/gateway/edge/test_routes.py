from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.edge.routes import Routes

METHODS = {
    "/v1/chat/completions": ("POST",),
    "/v1/messages": ("POST",),
    "/v1/models": ("GET",),
    "/v1/models/": ("GET",),
    "/v1/files": ("GET", "POST"),
    "/metrics": ("GET",),
    "/admin/": ("GET", "POST", "DELETE"),
}
ORIGIN = "https://chat.example.com"


async def upstream(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells what reached it; streams and breaks where its query says so."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    if scope["query_string"] == b"bug":
        raise RuntimeError("a bug")
    if scope["query_string"] == b"stream":
        return await StreamingResponse(chunks(), headers={"Vary": "Accept"})(scope, receive, send)
    return await JSONResponse({"path": scope["path"], "method": scope["method"]})(scope, receive, send)


def client(*origins: str) -> httpx.AsyncClient:
    app = Routes(upstream, methods=METHODS, pages={"/": PlainTextResponse("page")}, cors_origins=origins)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/a", "/v1/models/owner/model", "/admin/keys/1", "/metrics"])
async def test_routes_on_the_list_pass(path: str) -> None:
    assert (await client().get(path)).json() == {"path": path, "method": "GET"}


@pytest.mark.parametrize(
    "path", ["/load", "/docs", "/v1/load_lora_adapter", "/v1/models/", "/admin/", "/v1/chat", "//", "/x/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
async def test_all_else_is_not_found(path: str, method: str) -> None:
    response = await client("*").request(method, "http://test" + path)
    assert response.status_code == 404
    assert method == "HEAD" or path in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/messages"), ("POST", "/v1/messages/batches"), ("PUT", "/x")])
async def test_what_is_refused_here_has_an_id_too(method: str, path: str) -> None:
    named = await client().request(method, path, headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    nameless = await client().request(method, path, headers={"x-request-id": "not\tgood"})
    assert len(nameless.headers["x-request-id"]) == 16
    if path.startswith("/v1/messages"):
        assert named.json()["request_id"] == "mine-1"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/chat/completions", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/files", "GET, POST, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(path: str, allowed: str) -> None:
    for method in ("PUT", "TRACE", "PATCH"):
        response = await client().request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert response.json()["error"]["code"] == "method_not_allowed"


async def test_errors_have_the_form_of_the_api_that_was_asked() -> None:
    told = (await client().get("/v1/messages")).json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    told = (await client().get("/v1/messages/nothing")).json()
    assert (told["type"], told["error"]["type"]) == ("error", "not_found_error")
    assert (await client().get("/v1/responses/nothing")).json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics?stream"])
async def test_head_is_answered_as_get_without_the_body(path: str) -> None:
    got, head = await client().get(path), await client().head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == got.headers
    assert (await client().head("/v1/chat/completions")).status_code == 405


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models/a", "/admin/keys", "/"])
async def test_options_tell_the_methods(path: str) -> None:
    response = await client().options(path)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"].endswith("OPTIONS")
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_options_of_the_server_itself_are_told() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "OPTIONS", "path": "*", "headers": []}
    await Routes(upstream, methods=METHODS)(scope, send, send)  # type: ignore[arg-type]
    assert (sent[0]["status"], sent[0]["headers"]) == (204, [(b"allow", b"POST, GET, DELETE, HEAD, OPTIONS")])


# CORS (Fetch, 3.3)

PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(("origins", "granted"), [((ORIGIN, "http://localhost:3000"), ORIGIN), (("*",), "*")])
async def test_a_page_of_a_chosen_origin_may_ask(origins: tuple[str, ...], granted: str) -> None:
    response = await client(*origins).options("/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == granted
    assert response.headers["access-control-allow-methods"] == "POST, OPTIONS"
    allowed = response.headers["access-control-allow-headers"].split(", ")
    # The star does not stand for Authorization.
    assert {"authorization", "content-type", "x-api-key", "last-event-id", "anthropic-version", "*"} <= set(allowed)
    assert int(response.headers["access-control-max-age"]) > 0
    assert response.headers.get("vary") == (None if granted == "*" else "Origin")


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models?stream", "/v1/models?bug", "/nothing", "/v1/chat/completions"]
)
async def test_every_reply_may_be_read_errors_and_streams_included(path: str) -> None:
    response = await client(ORIGIN).get(path, headers={"Origin": ORIGIN})
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "Origin" in response.headers["vary"]
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert "retry-after" in response.headers["access-control-expose-headers"]
    if "bug" in path:
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", ORIGIN + ".evil.example", ORIGIN + ":8443", "null", "*", ""]
)
async def test_another_origin_is_granted_nothing(origin: str) -> None:
    http = client(ORIGIN)
    for response in (
        await http.options("/v1/models", headers={**PREFLIGHT, "Origin": origin}),
        await http.get("/v1/models", headers={"Origin": origin}),
        await http.get("/v1/models"),
    ):
        assert response.status_code in (200, 204)
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert response.headers["vary"] == "Origin"


async def test_by_default_no_origin_is_granted_anything() -> None:
    for response in (
        await client().options("/v1/models", headers=PREFLIGHT),
        await client().get("/v1/models", headers={"Origin": ORIGIN}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control") or name == "vary"]


async def test_a_stream_passes_untouched_where_nothing_is_to_be_added() -> None:
    """No chunk of it costs anything here."""
    sends: list[Send] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        sends.append(send)

    async def send(message: object) -> None: ...

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"origin", b"https://a.example")]}
    await Routes(app, methods=METHODS)(scope, send, send)  # type: ignore[arg-type]
    assert sends == [send]


async def test_an_error_in_the_middle_of_a_reply_is_left_to_the_protocol() -> None:
    sent: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RequestError("broke off")

    async def send(message: dict[str, object]) -> None:
        sent.append(str(message["type"]))

    scope = {"type": "http", "method": "HEAD", "path": "/v1/models", "headers": []}
    with pytest.raises(RequestError):
        await Routes(app, methods=METHODS)(scope, send, send)  # type: ignore[arg-type]
    assert sent == ["http.response.start"]


async def test_websockets_are_closed() -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await Routes(upstream, methods=METHODS)({"type": "websocket", "path": "/v1/models"}, send, send)  # type: ignore[arg-type]
    assert sent[0]["type"] == "websocket.close"
