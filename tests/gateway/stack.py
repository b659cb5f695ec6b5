"""Layers around a scripted upstream, asked over ASGI."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.call import Call
from synthia_vllm.gateway.contract import Contract
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.routes import Routes

ACCOUNTS = {
    "sk-alice": Account("alice"),
    "sk-small": Account("small", models=frozenset({"synthia"})),
    "sk-root": Account("root", admin=True),
}


class ScriptedEngine:
    """Answers a chat or completion like vLLM 0.29: one chunk a text, usage in each if asked for. Not a model."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts or ("Hel", "lo")
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        self.seen.append(msgspec.json.decode(body) if body else {})
        self.headers.append(dict(scope["headers"]))
        await self.answer(self.seen[-1], scope["path"])(scope, receive, send)

    def answer(self, request: dict[str, Any], path: str) -> ASGIApp:
        usage = {"prompt_tokens": 7, "total_tokens": 7 + len(self.texts), "completion_tokens": len(self.texts)}
        if not request.get("stream"):
            message = {"role": "assistant", "content": "".join(self.texts)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse({"id": "1", "choices": [choice], "usage": usage})
        return StreamingResponse(self._events(request, usage), media_type="text/event-stream")

    async def _events(self, request: dict[str, Any], usage: dict[str, int]) -> AsyncIterator[bytes]:
        options = request.get("stream_options") or {}
        for number, text in enumerate(self.texts, start=1):
            finish = "stop" if number == len(self.texts) else None
            chunk: dict[str, Any] = {
                "id": "1",
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}],
            }
            if options.get("continuous_usage_stats"):
                chunk["usage"] = {"prompt_tokens": 7, "total_tokens": 7 + number, "completion_tokens": number}
            yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        if options.get("include_usage"):
            yield b"data: " + msgspec.json.encode({"id": "1", "choices": [], "usage": usage}) + b"\n\n"
        yield b"data: [DONE]\n\n"


class Stack:
    """Routes, Access, Contract, Meter and a scripted engine."""

    def __init__(self, engine: ASGIApp, *, keys_required: bool = True, **options: Any) -> None:
        self.calls: list[Call] = []

        async def lookup(key: str) -> Account | None:
            return ACCOUNTS.get(key)

        layers = Contract(options.pop("between", lambda app: app)(Meter(engine)))
        self.access = Access(layers, lookup=lookup, keys_required=keys_required, on_end=self.calls.append, **options)
        self.app = Routes(self.access)

    def client(self, key: str | None = "sk-alice") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)
