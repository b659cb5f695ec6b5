"""Ending a request at a replica, whose reply goes on to its end then: what vLLM had made until it knew, and the usage.

By the names that vLLM 0.29 gives the requests of these two routes (`scale_out/token_in_token_out/serving.py`,
`openai/completion/serving.py`). Its own `/abort_requests` is there for disaggregated serving alone.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from synthia_vllm.api import abort
from synthia_vllm.api.base import decode
from synthia_vllm.api.errors import openai_form
from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.edge.replies import send_error

_NAMES = ("generate-tokens-{}", "cmpl-{}-0")


class Aborts:
    """Answers `POST /inference/v1/abort`. An ASGI app. Where nothing of that name is there, nothing is to be ended."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            wanted = decode(await request.body(), abort.AbortRequest)
        except RequestError as error:
            return await send_error(error, send, form=openai_form)
        await self._engine.abort([name.format(wanted.request_id) for name in _NAMES])
        return await Response(b"{}", media_type="application/json")(scope, receive, send)
