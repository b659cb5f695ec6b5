"""The engine's door: only our gateways may come in, though HAProxy shows the engine to everybody.

A gateway without its layers around it would be an engine without keys, limits and bill. Serve's own health checks are
answered before a request reaches the application, so nothing needs an exception here.
"""

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.api.errors import openai_form
from synthia_vllm.errors import Unauthorized
from synthia_vllm.gateway.edge.replies import header, send_error
from synthia_vllm.gateway.store.keys import load_secret
from synthia_vllm.settings import Settings

_PURPOSE = b"synthia-vllm: gateway to engine"


def engine_key(settings: Settings) -> str:
    """What gateways show and engines ask for, derived from the secret that they share anyway.

    Never part of a configuration: each process derives it from SYNTHIA_ACCESS__SECRET, or from the data folder.
    """
    return hmac.new(load_secret(settings), _PURPOSE, hashlib.sha256).hexdigest()


class Guard:
    """Lets requests through that bring the key as `Authorization: Bearer`, and answers the others 401."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing of ours speaks websocket
            return None
        if not hmac.compare_digest(header(scope, b"authorization"), self._expected):
            return await send_error(Unauthorized(), send, form=openai_form)
        return await self.app(scope, receive, send)
