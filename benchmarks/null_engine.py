"""A stand-in for vLLM's server: no model, only its HTTP shapes. For scale and faults; it tells nothing of inference.

    python -m benchmarks.null_engine --port 8001 [--tokens-per-second 20] [--max-num-seqs 64] [--break-after 9]
    python -m benchmarks.null_engine --tokenizer-folder DIR

Chunks have the fields and their order as vLLM 0.29 sends them; tests parse them with vLLM's own classes. Token ids are
those of `null_tokens`, so whoever asks `/inference/v1/generate` needs its tokenizer, which `--tokenizer-folder` writes:
`synthia-vllm gateway --tokenizer DIR`. There, tokens are numbered, and a reply that another null engine began goes on.
On `/v1/chat/completions` and `/v1/completions` they are for who asks for `return_token_ids`, or with `--numbered`.

`POST /fault` switches faults while it runs: a JSON object of their names. It answers with all faults and some counts.
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.types import Receive, Scope, Send

from benchmarks import null_generate
from benchmarks.null_faults import ENGINE_DEAD, ENGINE_DEAD_EVENT, Faults, SseForm
from benchmarks.null_generate import GENERATE, GenerateReply
from benchmarks.null_http import STREAM, answer, body_of, error, left, lifespan, no_such_thing, page, written_as
from benchmarks.null_replies import AnyReply, NumberedReply, Reply, Told
from benchmarks.null_tokens import WrongResume, ids_of

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_YIELD_EACH = 64  # chunks, at full speed: `send` does not let others run
# Slow streams are sent to at common moments, as a real engine's steps do: else each token wakes the process.
_SLOW_S, _STEP_S = 0.2, 0.05
_KV_BLOCKS, _BLOCK = 4096, 16
_WRONG = (ValueError, msgspec.MsgspecError)


class NullEngine:
    """Answers chats, completions and `/inference/v1/generate` with the wanted number of tokens.

    tokens_per_second   of each stream; None is as fast as it can
    prefill_s           before the first token
    max_num_seqs        requests at once, the others wait in order of arrival, as in vLLM
    text                what each token says that is not numbered
    numbered            all tokens are numbered, also for who asks for no ids
    max_model_len       told in `/v1/models`; bounds what `/inference/v1/generate` takes and generates
    reply_tokens        EOS comes after so many tokens of a reply, unless `ignore_eos`; None: never
    cached              prompt tokens that are told as cached, as with `--enable-prompt-tokens-details`; None: not told
    generate_route      False: an engine without it, as others than vLLM are: 404 there, and no `max_model_len`
    burst               so many chunks are one write, at full speed: so that it is not what limits a benchmark
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
        numbered: bool = False,
        max_model_len: int = 1 << 17,
        reply_tokens: int | None = None,
        cached: int | None = None,
        generate_route: bool = True,
        burst: int = 1,
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
        self.asked: deque[dict[str, Any]] = deque(maxlen=100)  # the latest requests' fields
        self.faults = faults or Faults(break_after=break_after)
        self.on_refuse: Callable[[float], Awaitable[None]] | None = None  # set by whoever holds the socket
        self._gap = 1 / tokens_per_second if tokens_per_second else 0.0
        self._prefill_s = prefill_s
        self._slots = asyncio.Semaphore(max_num_seqs) if max_num_seqs else contextlib.nullcontext()
        self._numbered = numbered
        self._told = Told(text, max_model_len, reply_tokens, cached)
        self._generate_route = generate_route
        self._burst = burst
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
            return await lifespan(receive, send)
        path = scope["path"]
        if path == "/fault":
            return await self._change_faults(await body_of(receive), send)
        routes = (_CHAT, _COMPLETIONS, GENERATE) if self._generate_route else (_CHAT, _COMPLETIONS)
        if path not in routes:
            return await self._tell(path, scope["method"], send)
        if scope["method"] != "POST":
            return await no_such_thing(send, 405, [(b"allow", b"POST")])
        headers = dict(scope["headers"])
        body = await body_of(receive)
        gone = asyncio.ensure_future(left(receive))
        begun, came = False, time.perf_counter()
        self.waiting += 1
        try:
            async with self._slots:
                begun = True
                self.waiting -= 1
                self._observe("request_queue_time", time.perf_counter() - came)
                await self._begin(path, headers, body, gone, send)
            self._observe("e2e_request_latency", time.perf_counter() - came)
        finally:
            self.waiting -= not begun
            gone.cancel()
        return None

    async def _tell(self, path: str, method: str, send: Send) -> None:
        if method not in ("GET", "HEAD"):
            return await no_such_thing(send)
        if path == "/metrics":
            return await answer(send, 200, self._metrics().encode(), b"text/plain")
        if path == "/health":
            return await answer(send, 503 if self.faults.dead else 200, b"{}")
        if path == "/version":
            return await answer(send, 200, b'{"version":"0.29.0"}')
        if path == "/v1/models":
            model: dict[str, Any] = {"id": "null", "object": "model", "created": 1_795_000_000, "owned_by": "null"}
            if self._generate_route:
                model |= {"owned_by": "vllm", "root": "null", "parent": None, "max_model_len": self._told.max_model_len}
            return await answer(send, 200, msgspec.json.encode({"object": "list", "data": [model]}))
        return await no_such_thing(send)

    async def _begin(
        self, path: str, headers: dict[bytes, bytes], body: bytes, gone: asyncio.Future[None], send: Send
    ) -> None:
        faults = self.faults
        if faults.status is not None or faults.dead:
            return await answer(send, faults.status or 500, ENGINE_DEAD)
        try:
            reply, prompt = self._reply(path, headers, body)
        except WrongResume as wrong:
            self.wrong_resumes.append(str(wrong))
            return await answer(send, 400, error(str(wrong), param="prompt"))
        except _WRONG as wrong:
            return await answer(send, 400, error(str(wrong)))
        self.resumed += reply.begun > 0
        if faults.poison is not None and faults.is_poison(prompt):
            if not faults.poison_at:
                faults.die()
            reply.deadly = max(1, faults.poison_at - reply.begun)
        if faults.sse is not None and path == _COMPLETIONS:
            if faults.sse == "html":
                return await page(send)
            send = written_as(faults.sse, send)
        return await self._generate(reply, gone, send)

    def _reply(self, path: str, headers: dict[bytes, bytes], body: bytes) -> tuple[AnyReply, Sequence[int]]:
        """The reply and its prompt. Raises ValueError or MsgspecError for what is refused, WrongResume among them."""
        number = next(self._ids)
        told = replace(self._told, lie=self.faults.usage_lie) if self.faults.usage_lie else self._told
        if path == GENERATE:
            kind = headers.get(b"content-type", b"").lower().split(b";")[0]
            if kind != b"application/json":
                raise ValueError("Unsupported Media Type: Only 'application/json' is allowed")
            asked = null_generate.read(body)
            self.asked.append(msgspec.structs.asdict(asked))
            request_id = (
                headers.get(b"x-request-id", b"").decode("latin-1") or asked.request_id or f"{self._own | number:016x}"
            )
            return GenerateReply(asked, request_id, told), asked.token_ids
        request = msgspec.json.decode(body, type=dict[str, Any])
        self.asked.append(request)
        prompt = ids_of(request)
        chat = path == _CHAT
        if self._numbered or request.get("return_token_ids"):
            return NumberedReply(request, chat, self._own | number, prompt, told), prompt
        return Reply(request, chat, number, prompt, told), prompt

    async def _generate(self, reply: AnyReply, gone: asyncio.Future[None], send: Send) -> None:
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
                await answer(send, 500, ENGINE_DEAD)
            else:
                self.generated += reply.tokens * reply.choices
                await answer(send, 200, reply.whole())
        finally:
            self.running -= 1

    async def _stream(self, reply: AnyReply, gone: asyncio.Future[None], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        if first := reply.first():
            await send({"type": "http.response.body", "body": first, "more_body": True})
        chunk, gap, faults, burst = reply.chunk, self._gap, self.faults, self._burst
        held: list[bytes] = []
        for number in range(1, reply.tokens + 1):
            if gap:
                await self._pause(gone)
            elif not number % _YIELD_EACH:
                await asyncio.sleep(0)
            if gone.done():
                self.aborted += 1
                return None
            if faults.in_streams:
                await _flush(held, send)
                if await faults.strike(number, gone):
                    return await send({"type": "http.response.body", "body": ENGINE_DEAD_EVENT, "more_body": False})
                if number == faults.end_after:
                    return await send({"type": "http.response.body", "body": b"", "more_body": False})
            if number == reply.deadly:
                faults.die()
            self.generated += reply.choices
            for index in range(reply.choices):
                held.append(chunk(number, index))
                if gap or len(held) >= burst:
                    await _flush(held, send)
        await _flush(held, send)
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
        except (*_WRONG, TypeError) as wrong:
            return await answer(send, 400, msgspec.json.encode({"error": str(wrong)}))
        counts = {name: getattr(self, name) for name in ("running", "aborted", "resumed", "wrong_resumes")}
        await answer(send, 200, msgspec.json.encode({"faults": self.faults.as_dict(), **counts}))
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


async def _flush(held: list[bytes], send: Send) -> None:
    """Sends what is held back, as one write."""
    if held:
        body = b"".join(held)
        held.clear()
        await send({"type": "http.response.body", "body": body, "more_body": True})


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


_TOKENIZER_HELP = (
    "Write the tokenizer into this folder, for `synthia-vllm gateway --tokenizer`; without --port, no more."
)
_SSE_HELP = "A fault: how else streams of /v1/completions are written. html and null_choices are wrong, the others not."


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, help="Where it listens; needed to serve.")
@click.option("--tokenizer-folder", type=click.Path(file_okay=False, path_type=Path), help=_TOKENIZER_HELP)
@click.option("--tokens-per-second", type=float, help="Of each stream (default: as fast as it can).")
@click.option("--prefill-s", type=float, default=0.0, show_default=True, help="Seconds before a first token.")
@click.option("--max-num-seqs", type=int, help="Requests at once; the others wait in order of arrival.")
@click.option("--max-model-len", type=int, default=1 << 17, show_default=True, help="Tokens of prompt and reply.")
@click.option("--reply-tokens", type=int, help="EOS comes after so many tokens of a reply (default: never).")
@click.option("--cached-tokens", "cached", type=int, help="Told as in the prefix cache (default: not told).")
@click.option("--numbered", is_flag=True, help="Number all tokens on /v1/…, also for who asks for no token ids.")
@click.option(
    "--generate-route/--no-generate-route",
    default=True,
    show_default=True,
    help="Whether there is /inference/v1/generate, or a 404 as with other engines than vLLM.",
)
@click.option("--burst", type=int, default=1, show_default=True, help="Chunks in one write, at full speed.")
@click.option("--break-after", type=int, help="A fault: each stream breaks after so many tokens.")
@click.option("--end-after", type=int, help="A fault: each stream just ends after so many tokens.")
@click.option("--stall-after", type=int, help="A fault: each stream falls silent after so many tokens.")
@click.option("--hang", is_flag=True, help="A fault: nothing is sent.")
@click.option("--status", type=int, help="A fault: every request gets this error.")
@click.option("--dead", is_flag=True, help="A fault: says in every stream that its engine is dead.")
@click.option("--poison", help="A fault: a prompt with this text in it ends the process.")
@click.option("--poison-at", type=int, default=0, help="Not at once, but at this token of its reply.")
@click.option("--usage-lie", type=int, default=0, help="A fault: so many tokens more are told.")
@click.option("--sse", type=click.Choice(get_args(SseForm)), help=_SSE_HELP)
def main(
    host: str,
    port: int | None,
    tokenizer_folder: Path | None,
    tokens_per_second: float | None,
    prefill_s: float,
    max_num_seqs: int | None,
    max_model_len: int,
    reply_tokens: int | None,
    cached: int | None,
    numbered: bool,
    generate_route: bool,
    burst: int,
    **faults: Any,
) -> None:
    """Serve the null engine, bare: vLLM's HTTP shapes without a model.

    Faults can also be switched while it runs: POST /fault with a JSON object of their names (break_after, end_after,
    stall_after, hang, status, dead, poison, poison_at, usage_lie, refuse_s, sse).
    """
    if tokenizer_folder is not None:
        from benchmarks.null_tokenizer import write

        click.echo(write(tokenizer_folder))
    if port is None:
        if tokenizer_folder is None:
            raise click.UsageError(
                "--port says where to listen, --tokenizer-folder writes the tokenizer; give one of them"
            )
        return
    import uvloop

    engine = NullEngine(
        tokens_per_second=tokens_per_second,
        prefill_s=prefill_s,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        reply_tokens=reply_tokens,
        cached=cached,
        numbered=numbered,
        generate_route=generate_route,
        burst=burst,
        faults=Faults(**faults),
    )
    uvloop.run(serve(engine, host, port))


if __name__ == "__main__":
    main()
