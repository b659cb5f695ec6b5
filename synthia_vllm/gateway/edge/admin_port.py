"""A port of its own for keys and metrics, so that a balancer or a firewall never has to tell them from requests."""

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.api.errors import form_of
from synthia_vllm.errors import NotFound
from synthia_vllm.gateway.edge.replies import header, request_ids, send_error
from synthia_vllm.gateway.edge.routes import ADMIN_PREFIX

_METRICS = frozenset({"/metrics", "/sd"})


class AdminPort:
    """Answers 404 to routes for operators that come in by another port than `port`; there, all routes are."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and for_operators(scope["path"]) and scope["server"][1] != self._port:
            _, told = request_ids(header(scope, b"x-request-id"))
            form = form_of(scope["path"], dict(scope["headers"]))
            await send_error(NotFound(scope["path"]), send, form=form, request_id=told)
        else:
            await self._app(scope, receive, send)


def for_operators(path: str) -> bool:
    """Whether a route is about keys, users or metrics."""
    return path in _METRICS or path.startswith(ADMIN_PREFIX)
