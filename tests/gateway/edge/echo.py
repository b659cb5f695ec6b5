"""An app for the edge's tests: it tells what it was asked, and does what its path says."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.api.errors import form_of
from synthia_vllm.errors import RequestError, Unauthorized
from synthia_vllm.gateway.edge.body import read_body
from synthia_vllm.gateway.edge.replies import send_error

LIMIT = 100_000


@dataclass
class Echo:
    """Reads and tells the body, but for the paths `/early` (401, unread), `/broken` and `/wait`.

    `/stream` answers in ten chunks, `/flood` in as many as its query says, `/drip` until its client has left.
    """

    served: list[tuple[str, str, bytes | None]] = field(default_factory=list)  # method, path, body
    scopes: deque[Scope] = field(default_factory=lambda: deque(maxlen=50))
    disconnected: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        path = scope["path"]
        self.scopes.append(scope)
        try:
            await self._answer(path, scope, receive, send)
        except RequestError as error:
            await send_error(error, send, form=form_of(path))

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path.endswith("/early"):
            raise Unauthorized
        if path.endswith("/broken"):
            raise RuntimeError("a bug")
        if path == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnected.append(scope["query_string"].decode())
            return
        if path == "/drip":
            left = asyncio.ensure_future(receive())  # a GET's empty body
            await left
            left = asyncio.ensure_future(receive())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not left.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0.01)
            self.disconnected.append(path)
            return
        body = await read_body(scope, receive, LIMIT, 5.0)
        self.served.append((scope["method"], path, body))
        if path == "/stream":
            await _send_chunks(send, [b"chunk"] * 10, 0.1)
        elif path == "/flood":
            await _send_chunks(send, [b"x" * 65536] * int(scope["query_string"]), 0)
        elif body is not None:
            await JSONResponse({"body": body.decode(errors="replace")})(scope, receive, send)


async def _send_chunks(send: Send, chunks: list[bytes], pause: float) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for chunk in chunks:
        await asyncio.sleep(pause)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
