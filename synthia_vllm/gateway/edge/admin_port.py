"""A port of its own for keys and metrics, so that a balancer or a firewall never has to tell them from requests."""

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.errors import NotFound
from synthia_vllm.gateway.edge.replies import refuse
from synthia_vllm.gateway.edge.routes import for_operators


class AdminPort:
    """Answers 404 to routes for operators that come in by another port than `port`; there, all routes are."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and for_operators(scope["path"]) and scope["server"][1] != self._port:
            await refuse(NotFound(scope["path"]), scope, send)
        else:
            await self._app(scope, receive, send)
