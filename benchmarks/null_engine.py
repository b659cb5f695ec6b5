"""A stand-in for vLLM's server: no model, only its HTTP shapes. For scale and faults; it tells nothing of inference.

    python -m benchmarks.null_engine --port 8001 [--tokens-per-second 20] [--max-num-seqs 64] [--break-after 9]

Chunks have the fields and their order as vLLM 0.29 sends them; a test parses them with vLLM's own classes. Asked for
`return_token_ids`, it numbers its tokens, and goes on with a reply that another null engine began (`null_tokens`).
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgspec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.types import Message, Receive, Scope, Send

from benchmarks.null_faults import ENGINE_DEAD, ENGINE_DEAD_EVENT, Faults
from benchmarks.null_replies import NumberedReply, Reply, given_ids
from benchmarks.null_tokens import WrongResume, text_of

_YIELD_EACH = 64  # chunks, at full speed: `send` does not let others run
# Slow streams are sent to at common moments, as a real engine's steps do: else each token wakes the process.
_SLOW_S, _STEP_S = 0.2, 0.05
_KV_BLOCKS, _BLOCK = 4096, 16


class NullEngine:
    """Answers chats and completions with the wanted number of tokens, `text` again and again.

    tokens_per_second   of each stream; None is as fast as it can
    prefill_s           before the first token
    max_num_seqs        requests at once, the others wait in order of arrival, as in vLLM
    break_after         faults: the connection breaks after so many tokens
    faults              all of them; they can be changed while it runs
    """

    def __init__(
        self,
        *,
        tokens_per_second: float | None = None,
        prefill_s: float = 0.0,
        max_num_seqs: int | None = None,
        text: str = " word",
        break_after: int | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.running = 0
        self.waiting = 0
        self.aborted = 0
        self.resumed = 0  # replies that another engine began
        self.wrong_resumes: list[str] = []  # and those refused because their tokens were not the reply's
        self.prompt_tokens = 0
        self.generated = 0
        self.order: list[str] = []  # first words of the prompts, as they were begun
        self.faults = faults or Faults(break_after=break_after)
        self.on_refuse: Callable[[float], Awaitable[None]] | None = None  # set by whoever holds the socket
        self._gap = 1 / tokens_per_second if tokens_per_second else 0.0
        self._prefill_s = prefill_s
        self._slots = asyncio.Semaphore(max_num_seqs) if max_num_seqs else contextlib.nullcontext()
        self._text = text
        self._ids = itertools.count()
        self._own = secrets.randbits(31) << 32  # no two engines' replies have one id
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
        if scope["path"] == "/fault":
            return await self._change_faults(await _body(receive), send)
        if scope["method"] == "GET":
            return await self._tell(scope["path"], send)
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
                await self._begin(request, chat, gone, send)
            self._observe("e2e_request_latency", time.perf_counter() - came)
        finally:
            self.waiting -= not begun
            gone.cancel()
        return None

    async def _tell(self, path: str, send: Send) -> None:
        if path == "/metrics":
            return await _answer(send, 200, self._metrics().encode(), b"text/plain")
        if path == "/health":
            return await _answer(send, 503 if self.faults.dead else 200, b"{}")
        if path == "/v1/models":
            return await _answer(send, 200, b'{"object":"list","data":[{"id":"null","object":"model"}]}')
        return await _answer(send, 404, b"{}")

    async def _begin(self, request: dict[str, Any], chat: bool, gone: asyncio.Future[None], send: Send) -> None:
        faults = self.faults
        if faults.status is not None or faults.dead:
            return await _answer(send, faults.status or 500, ENGINE_DEAD)
        poisoned = faults.poison is not None and faults.is_poison(text_of(request), given_ids(request))
        if poisoned and not faults.poison_at:
            faults.die()
        if not request.get("return_token_ids"):
            reply = Reply(request, chat, next(self._ids), self._text, faults.usage_lie)
            return await self._generate(reply, gone, send)
        try:
            number = self._own | next(self._ids)
            numbered = NumberedReply(request, chat, number, faults.usage_lie, faults.poison)
        except WrongResume as error:
            self.wrong_resumes.append(str(error))
            told = {"message": str(error), "type": "BadRequestError", "param": "prompt", "code": 400}
            return await _answer(send, 400, msgspec.json.encode({"error": told}))
        self.resumed += numbered.begun > 0
        if poisoned:
            numbered.deadly = max(1, faults.poison_at - numbered.begun)
        return await self._generate(numbered, gone, send)

    async def _generate(self, reply: Reply, gone: asyncio.Future[None], send: Send) -> None:
        self.running += 1
        self.prompt_tokens += reply.prompt
        try:
            waits = self._prefill_s + (0.0 if reply.stream else self._gap * reply.tokens)
            if waits:
                await asyncio.wait((gone,), timeout=waits)
            if self.faults.hang:
                await self.faults.strike(0, gone)
            if gone.done():
                self.aborted += 1
            elif reply.stream:
                self._observe("time_to_first_token", self._prefill_s + self._gap)
                self._observe("inter_token_latency", self._gap)  # one a stream: more would slow it down
                await self._stream(reply, gone, send)
            elif self.faults.dead:
                await _answer(send, 500, ENGINE_DEAD)
            else:
                self.generated += reply.tokens * reply.choices
                await _answer(send, 200, reply.whole())
        finally:
            self.running -= 1

    async def _stream(self, reply: Reply, gone: asyncio.Future[None], send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if first := reply.first():
            await send({"type": "http.response.body", "body": first, "more_body": True})
        chunk, gap, faults = reply.chunk, self._gap, self.faults
        for number in range(1, reply.tokens + 1):
            if gap:
                await self._pause(gone)
            elif not number % _YIELD_EACH:
                await asyncio.sleep(0)
            if gone.done():
                self.aborted += 1
                return None
            if faults.in_streams and await faults.strike(number, gone):
                return await send({"type": "http.response.body", "body": ENGINE_DEAD_EVENT, "more_body": False})
            if number == faults.end_after:
                return await send({"type": "http.response.body", "body": b"", "more_body": False})
            if number == reply.deadly:
                faults.die()
            self.generated += reply.choices
            for index in range(reply.choices):
                await send({"type": "http.response.body", "body": chunk(number, index), "more_body": True})
        await send({"type": "http.response.body", "body": reply.last(), "more_body": False})
        return None

    async def _pause(self, gone: asyncio.Future[None]) -> None:
        """Until the next token is due, or the client has left."""
        gap = self._gap
        if gap >= _SLOW_S:
            gap -= asyncio.get_running_loop().time() % _STEP_S
        await asyncio.wait((gone,), timeout=gap)

    async def _change_faults(self, body: bytes, send: Send) -> None:
        """`POST /fault`: switches those that are named; answers with all, and with what has become of requests."""
        try:
            self.faults.change(msgspec.json.decode(body) if body else {})
        except (ValueError, TypeError) as error:
            return await _answer(send, 400, msgspec.json.encode({"error": str(error)}))
        counts = {name: getattr(self, name) for name in ("running", "aborted", "resumed", "wrong_resumes")}
        await _answer(send, 200, msgspec.json.encode({"faults": self.faults.as_dict(), **counts}))
        if self.faults.refuse_s is not None and self.on_refuse is not None:
            seconds, self.faults.refuse_s = self.faults.refuse_s, None
            await self.on_refuse(seconds)
        return None

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


async def serve(engine: NullEngine, host: str, port: int) -> None:
    """Until a signal."""
    import uvicorn

    config = uvicorn.Config(
        engine, host=host, port=port, loop="uvloop", http="httptools", log_level="critical", access_log=False
    )
    server = uvicorn.Server(config)

    async def refuse(seconds: float) -> None:
        for listening in server.servers:
            listening.close()
        await asyncio.sleep(seconds)
        protocol: Any = config.http_protocol_class
        again = await asyncio.get_running_loop().create_server(
            lambda: protocol(config=config, server_state=server.server_state, app_state={}), host, port
        )
        server.servers = [again]

    engine.on_refuse = refuse
    await server.serve()


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
@click.option("--tokens-per-second", type=float, help="Of each stream (default: as fast as it can).")
@click.option("--prefill-s", type=float, default=0.0, show_default=True)
@click.option("--max-num-seqs", type=int)
@click.option("--break-after", type=int, help="A fault: each stream breaks after so many tokens.")
@click.option("--end-after", type=int, help="A fault: each stream just ends after so many tokens.")
@click.option("--stall-after", type=int, help="A fault: each stream falls silent after so many tokens.")
@click.option("--hang", is_flag=True, help="A fault: nothing is sent.")
@click.option("--status", type=int, help="A fault: every request gets this error.")
@click.option("--dead", is_flag=True, help="A fault: says in every stream that its engine is dead.")
@click.option("--poison", help="A fault: a prompt with this text in it ends the process.")
@click.option("--poison-at", type=int, default=0, help="Not at once, but at this token of its reply.")
@click.option("--usage-lie", type=int, default=0, help="A fault: so many tokens more are told.")
def main(
    host: str,
    port: int,
    tokens_per_second: float | None,
    prefill_s: float,
    max_num_seqs: int | None,
    **faults: Any,
) -> None:
    """Serve the null engine, bare."""
    import uvloop

    engine = NullEngine(
        tokens_per_second=tokens_per_second,
        prefill_s=prefill_s,
        max_num_seqs=max_num_seqs,
        faults=Faults(**faults),
    )
    uvloop.run(serve(engine, host, port))


if __name__ == "__main__":
    main()
