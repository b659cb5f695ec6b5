"""A stand-in for vLLM's server: no model, only its HTTP shapes. For scale and faults; it tells nothing of inference.

    python -m benchmarks.null_engine --port 8001 [--tokens-per-second 20] [--max-num-seqs 64]

Chunks have the fields and their order as vLLM 0.29 sends them; a test parses them with vLLM's own classes.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgspec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.types import Message, Receive, Scope, Send

_YIELD_EACH = 64  # chunks, at full speed: `send` does not let others run
_KV_BLOCKS, _BLOCK = 4096, 16


class NullEngine:
    """Answers chats and completions with the wanted number of tokens, `text` again and again.

    tokens_per_second   of each stream; None is as fast as it can
    prefill_s           before the first token
    max_num_seqs        requests at once, the others wait in order of arrival, as in vLLM
    break_after         faults: the connection breaks after so many tokens
    """

    def __init__(
        self,
        *,
        tokens_per_second: float | None = None,
        prefill_s: float = 0.0,
        max_num_seqs: int | None = None,
        text: str = " word",
        break_after: int | None = None,
    ) -> None:
        self.running = 0
        self.waiting = 0
        self.aborted = 0
        self.prompt_tokens = 0
        self.generated = 0
        self.order: list[str] = []  # first words of the prompts, as they were begun
        self._gap = 1 / tokens_per_second if tokens_per_second else 0.0
        self._prefill_s = prefill_s
        self._slots = asyncio.Semaphore(max_num_seqs) if max_num_seqs else contextlib.nullcontext()
        self._text = text
        self._break_after = break_after
        self._ids = itertools.count()
        self._registry = CollectorRegistry()
        self._times = {
            name: Histogram(
                f"vllm:{name}_seconds", "As vLLM names it.", ["engine", "model_name"], registry=self._registry
            )
            for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        route = (scope["method"], scope["path"])
        if route == ("GET", "/metrics"):
            return await _answer(send, 200, self._metrics().encode(), b"text/plain")
        if route == ("GET", "/health"):
            return await _answer(send, 200, b"{}")
        if route == ("GET", "/v1/models"):
            return await _answer(send, 200, b'{"object":"list","data":[{"id":"null","object":"model"}]}')
        chat = scope["path"] == "/v1/chat/completions"
        if scope["method"] != "POST" or not (chat or scope["path"] == "/v1/completions"):
            return await _answer(send, 404, b"{}")
        request = msgspec.json.decode(await _body(receive))
        gone = asyncio.ensure_future(_left(receive))
        begun, came = False, time.perf_counter()
        self.waiting += 1
        try:
            async with self._slots:
                begun = True
                self.waiting -= 1
                self._observe("request_queue_time", time.perf_counter() - came)
                await self._generate(_Reply(request, chat, next(self._ids), self._text), gone, send)
            self._observe("e2e_request_latency", time.perf_counter() - came)
        finally:
            self.waiting -= not begun
            gone.cancel()
        return None

    async def _generate(self, reply: "_Reply", gone: asyncio.Future[None], send: Send) -> None:
        self.running += 1
        self.prompt_tokens += reply.prompt
        try:
            waits = self._prefill_s + (0.0 if reply.stream else self._gap * reply.tokens)
            if waits:
                await asyncio.wait((gone,), timeout=waits)
            if gone.done():
                self.aborted += 1
            elif reply.stream:
                self._observe("time_to_first_token", self._prefill_s + self._gap)
                self._observe("inter_token_latency", self._gap)  # one a stream: more would slow it down
                await self._stream(reply, gone, send)
            else:
                self.generated += reply.tokens * reply.choices
                await _answer(send, 200, reply.whole())
        finally:
            self.running -= 1

    async def _stream(self, reply: "_Reply", gone: asyncio.Future[None], send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if first := reply.first():
            await send({"type": "http.response.body", "body": first, "more_body": True})
        chunk, gap = reply.chunk, self._gap
        for number in range(1, reply.tokens + 1):
            if gap:
                await asyncio.wait((gone,), timeout=gap)
            elif not number % _YIELD_EACH:
                await asyncio.sleep(0)
            if gone.done():
                self.aborted += 1
                return
            if number == self._break_after:
                raise ConnectionResetError("a fault, as ordered")
            self.generated += reply.choices
            for index in range(reply.choices):
                await send({"type": "http.response.body", "body": chunk(number, index), "more_body": True})
        await send({"type": "http.response.body", "body": reply.last(), "more_body": False})

    def _observe(self, name: str, seconds: float) -> None:
        self._times[name].labels("0", "null").observe(seconds)

    def _metrics(self) -> str:
        labels = 'engine="0",model_name="null"'
        series = (
            ("cache_config_info", "gauge", f'block_size="{_BLOCK}",engine="0",num_gpu_blocks="{_KV_BLOCKS}"', 1.0),
            ("num_requests_running", "gauge", labels, float(self.running)),
            ("num_requests_waiting", "gauge", labels, float(self.waiting)),
            ("kv_cache_usage_perc", "gauge", labels, self.running / 1000),
            ("num_preemptions_total", "counter", labels, 0.0),
            ("prompt_tokens_total", "counter", labels, float(self.prompt_tokens)),
            ("generation_tokens_total", "counter", labels, float(self.generated)),
            ("prefix_cache_queries_total", "counter", labels, float(self.prompt_tokens)),
            ("prefix_cache_hits_total", "counter", labels, 0.0),
        )
        return generate_latest(self._registry).decode() + "".join(
            f"# HELP vllm:{name} As vLLM names it.\n# TYPE vllm:{name} {kind}\nvllm:{name}{{{labels}}} {value}\n"
            for name, kind, labels, value in series
        )


class _Reply:
    """The bytes of one reply; what does not change from chunk to chunk is put together once."""

    def __init__(self, request: dict[str, Any], chat: bool, number: int, text: str) -> None:
        wanted = request.get("max_completion_tokens") or request.get("max_tokens")
        self.tokens: int = wanted or (1024 if chat else 16)
        self.stream = bool(request.get("stream"))
        self.choices: int = request.get("n") or 1
        self._chat = chat
        self._text = text
        self.prompt = max(1, len(str(request.get("messages", request.get("prompt")))) // 4)
        options = request.get("stream_options") or {}
        self._usage = bool(options.get("include_usage"))
        self._continuous = self._usage and bool(options.get("continuous_usage_stats"))
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        model = request.get("model", "null")
        self._head = {"id": f"{prefix}-{number:016x}", "object": kind, "created": 1_795_000_000, "model": model}
        if chat:
            choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            self._events_head = {**self._head, "object": "chat.completion.chunk"}
            self._details = b',"completion_tokens_details":null'
        else:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
            choice["prompt_token_ids"] = None
            self._details = b""
            self._events_head = self._head
        self._choice = {**choice, "token_ids": None}
        self._bodies = [
            msgspec.json.encode({**self._events_head, "choices": [{**self._choice, "index": index}]})[:-1]
            for index in range(self.choices)
        ]

    def first(self) -> bytes:
        if not self._chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        chunks = ({**self._events_head, "choices": [{**choice, "index": index}]} for index in range(self.choices))
        return b"".join(self._event(chunk, 0, {"prompt_token_ids": None, "prompt_text": None}) for chunk in chunks)

    def chunk(self, number: int, index: int) -> bytes:
        if number == self.tokens:
            choice = {**self._choice, "index": index, "finish_reason": "length", "stop_reason": None}
            return self._event({**self._events_head, "choices": [choice]}, number)
        if not self._continuous:
            return b"data: %b}\n\n" % self._bodies[index]
        prompt = self.prompt
        return b'data: %b,"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}}\n\n' % (
            self._bodies[index],
            prompt,
            prompt + number,
            number,
            self._details,
        )

    def last(self) -> bytes:
        if not self._usage:
            return b"data: [DONE]\n\n"
        chunk = {**self._events_head, "choices": [], "usage": self._count(self.tokens * self.choices)}
        return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"

    def whole(self) -> bytes:
        text = self._text * self.tokens
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choices = [{**choice, "index": index} for index in range(self.choices)]
        return msgspec.json.encode({**self._head, "choices": choices, "usage": self._count(self.tokens * self.choices)})

    def _event(self, chunk: dict[str, Any], number: int, tail: dict[str, Any] | None = None) -> bytes:
        if self._continuous:
            details = {"completion_tokens_details": None} if self._details else {}
            chunk = {**chunk, "usage": self._count(number) | details}
        return b"data: " + msgspec.json.encode(chunk | (tail or {})) + b"\n\n"

    def _count(self, number: int) -> dict[str, Any]:
        prompt = self.prompt
        return {"prompt_tokens": prompt, "total_tokens": prompt + number, "completion_tokens": number}


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def _left(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--tokens-per-second", type=float, help="Of each stream (default: as fast as it can).")
@click.option("--prefill-s", type=float, default=0.0, show_default=True)
@click.option("--max-num-seqs", type=int)
def main(port: int, **options: Any) -> None:
    """Serve the null engine, bare."""
    import uvicorn

    uvicorn.run(NullEngine(**options), port=port, loop="uvloop", http="httptools", log_level="warning")


if __name__ == "__main__":
    main()
