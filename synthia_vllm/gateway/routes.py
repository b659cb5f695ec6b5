"""Which routes there are. vLLM has many more, some of which change the server; they stay out of reach."""

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.errors import NotFound
from synthia_vllm.gateway.replies import send_error

ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
    }
)


class Routes:
    """Passes the routes on the allow-list, answers 404 for all else. A pure ASGI layer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _allowed(scope["path"]):
            return await send_error(NotFound(scope["path"]), scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": "no such route"})
        return await self.app(scope, receive, send)


def _allowed(path: str) -> bool:
    return path in ROUTES or (path.startswith("/v1/models/") and ".." not in path)
