"""Which routes there are. vLLM has many more, some of which change the server; they stay out of reach."""

from urllib.parse import unquote

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.errors import MethodNotAllowed, NotFound, RequestError
from synthia_vllm.gateway.replies import send_error, send_json

ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/health": "GET",
    "/ready": "GET",
    "/metrics": "GET",
    "/sd": "GET",
}
ADMIN_PREFIX = "/admin/"  # has its own routes, behind a key of its own
_MODEL_PREFIX = "/v1/models/"


class Routes:
    """Passes the routes on the allow-list, answers 404 for all else. A pure ASGI layer.

    `GET /v1/models/{id}`, which vLLM does not have, is answered from upstream's `/v1/models`. `page` is what answers at
    `/`, where there is one; it needs no key.
    """

    def __init__(self, app: ASGIApp, *, page: ASGIApp | None = None) -> None:
        self.app = app
        self.page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": "no such route"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path.startswith(ADMIN_PREFIX):
            return await self.app(scope, receive, send)
        page = self.page if path == "/" else None
        method = "GET" if page or path.startswith(_MODEL_PREFIX) else ROUTES.get(path)
        error: RequestError | None = None
        if method is None:
            error = NotFound(path)
        elif scope["method"] != method and (scope["method"], method) != ("HEAD", "GET"):
            error = MethodNotAllowed(path, method)
        if error is not None:
            return await send_error(error, send)
        if path.startswith(_MODEL_PREFIX):
            return await self._model(unquote(path.removeprefix(_MODEL_PREFIX)), scope, receive, send)
        return await (page or self.app)(scope, receive, send)

    async def _model(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def collect(message: Message) -> None:
            body.extend(message.get("body", b""))

        await self.app({**scope, "path": "/v1/models", "raw_path": b"/v1/models"}, receive, collect)
        for model in msgspec.json.decode(body).get("data", ()):
            if model["id"] == name:
                return await send_json(200, model, send)
        return await send_error(NotFound(f"{_MODEL_PREFIX}{name}"), send)
