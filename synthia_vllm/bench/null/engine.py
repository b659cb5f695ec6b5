"""A stand-in for vLLM's server: no model, only its HTTP shapes. For scale and faults; it tells nothing of inference.

    python -m synthia_vllm.bench.null.engine --port 8001 [--tokens-per-second 20] [--max-num-seqs 64] [--break-after 9]
    python -m synthia_vllm.bench.null.engine --tokenizer-folder DIR

Chunks have the fields and their order as vLLM 0.29 sends them; tests parse them with vLLM's own classes. Token ids are
those of `null_tokens`, so whoever asks `/inference/v1/generate` needs its tokenizer, which `--tokenizer-folder` writes:
`synthia-vllm gateway --tokenizer DIR`. There, tokens are numbered, and a reply that another null engine began goes on.
On `/v1/chat/completions` and `/v1/completions` they are for who asks for `return_token_ids`, or with `--numbered`.

With `--max-num-seqs` and `--prefill-tokens-per-second` it has a queue as vLLM's (`null_queue`), and `/metrics` tells of
it what vLLM tells, when vLLM does.

`POST /fault` switches faults while it runs: a JSON object of their names. It answers with all faults, some counts, and
whose replies are under way (`null_tokens.seed_of` their prompts).
SIGUSR1 drains it as Ray Serve drains a replica: five seconds later its port is closed, and what runs goes to its end.
"""

import asyncio
import itertools
import secrets
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from starlette.types import Receive, Scope, Send

from synthia_vllm.api.abort import PATH as ABORT
from synthia_vllm.api.abort import AbortRequest
from synthia_vllm.bench.null import generate
from synthia_vllm.bench.null.faults import ENGINE_DEAD, ENGINE_DEAD_EVENT, Faults, MetricsLie, SseForm
from synthia_vllm.bench.null.generate import GENERATE, GenerateReply
from synthia_vllm.bench.null.http import STREAM, answer, body_of, error, left, lifespan, no_such_thing, page, written_as
from synthia_vllm.bench.null.metrics import Metrics
from synthia_vllm.bench.null.queue import Queue, Seat
from synthia_vllm.bench.null.replies import AnyReply, NumberedReply, Reply, Told
from synthia_vllm.bench.null.tokens import WrongResume, ids_of

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_YIELD_EACH = 64  # chunks, at full speed: `send` does not let others run
# Slow streams are sent to at common moments, as a real engine's steps do: else each token wakes the process.
_SLOW_S, _STEP_S = 0.2, 0.05
_DRAIN_S = 5.0  # Ray Serve 2.60 behind HAProxy: the port stays open for so long
_WRONG = (ValueError, msgspec.MsgspecError)


class NullEngine:
    """Answers chats, completions and `/inference/v1/generate` with the wanted number of tokens.

    tokens_per_second   of each stream; None is as fast as it can
    prefill_s           before the first token
    prefill_tokens_per_second   or in steps, by the prompts' lengths (`null_queue`)
    max_num_seqs        requests at once, the others wait in order of arrival, as in vLLM
    blocks              of the KV cache, of 16 tokens; requests wait for them only with `max_num_seqs`
    tell_max_num_seqs   in `/metrics`, as our own engines do; others than ours don't
    early_headers       a stream's headers are sent when it comes, as vLLM does, and not with its first token
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
        prefill_tokens_per_second: float | None = None,
        max_num_seqs: int | None = None,
        blocks: int = 4096,
        early_headers: bool = False,
        tell_max_num_seqs: bool = True,
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
        self.aborted = 0
        self.resumed = 0  # replies that another engine began
        self.wrong_resumes: list[str] = []  # and those refused because their tokens were not the reply's
        self.asked: deque[dict[str, Any]] = deque(maxlen=100)  # the latest requests' fields
        self.faults = faults or Faults(break_after=break_after)
        # Set by whoever holds the socket.
        self.on_refuse: Callable[[float], Awaitable[None]] | None = None
        self.on_drain: Callable[[float], None] | None = None
        self._gap = 1 / tokens_per_second if tokens_per_second else 0.0
        self._early_headers = early_headers
        self._queue = Queue(
            max_num_seqs=max_num_seqs,
            prefill_s=prefill_s,
            tokens_per_second=prefill_tokens_per_second,
            blocks=blocks,
            stuck=lambda: self.faults.stuck,
        )
        self._seeds: dict[Seat, int | None] = {}  # of the replies under way
        self._under_way: dict[str, asyncio.Future[None]] = {}  # done when the client has left, by X-Request-Id
        self._metrics = Metrics(self._queue, self.faults, max_num_seqs if tell_max_num_seqs else None)
        self._numbered = numbered
        self._told = Told(text, max_model_len, reply_tokens, cached)
        self._generate_route = generate_route
        self._burst = burst
        self._ids = itertools.count()
        self._own = secrets.randbits(31) << 32  # no two engines' replies have one id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        path = scope["path"]
        if path == "/fault":
            return await self._change_faults(await body_of(receive), send)
        routes = (_CHAT, _COMPLETIONS, GENERATE, ABORT) if self._generate_route else (_CHAT, _COMPLETIONS)
        if path not in routes:
            return await self._tell(path, scope["method"], send)
        if scope["method"] != "POST":
            return await no_such_thing(send, 405, [(b"allow", b"POST")])
        headers = dict(scope["headers"])
        body = await body_of(receive)
        if path == ABORT:
            return await self._abort(body, send)
        gone = asyncio.ensure_future(left(receive))
        name = headers.get(b"x-request-id", b"").decode("latin-1")
        self._under_way[name] = gone
        came = time.perf_counter()
        try:
            await self._begin(path, headers, body, gone, send)
            self._metrics.observe("e2e_request_latency", time.perf_counter() - came)
        finally:
            gone.cancel()
            self._under_way.pop(name, None)
        return None

    async def _abort(self, body: bytes, send: Send) -> None:
        """As a replica of ours does: the reply ends with its usage."""
        try:
            wanted = msgspec.json.decode(body, type=AbortRequest).request_id
        except msgspec.MsgspecError as wrong:
            return await answer(send, 400, error(str(wrong)))
        if (gone := self._under_way.get(wanted)) is not None:
            gone.cancel()  # which tells it from a client that has left
        return await answer(send, 200, b"{}")

    @property
    def running(self) -> int:
        return len(self._queue.running)

    @property
    def waiting(self) -> int:
        return len(self._queue.waiting) + self._queue.unseen

    @property
    def prompt_tokens(self) -> int:
        return self._queue.prompt_tokens

    @property
    def generated(self) -> int:
        return self._metrics.generated

    async def _tell(self, path: str, method: str, send: Send) -> None:
        if method not in ("GET", "HEAD"):
            return await no_such_thing(send)
        if path == "/metrics":
            return await self._metrics.tell(send)
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
            reply.deadly = faults.poison_after or (max(1, faults.poison_at - reply.begun) if faults.poison_at else 0)
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
            asked = generate.read(body)
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
        came = time.perf_counter()
        seat = self._queue.arrive(reply.prompt)
        self._seeds[seat] = reply.seed
        try:
            early = reply.stream and self._early_headers and not self.faults.hang
            if early:
                await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            await self._queue.prefill(seat, gone)
            if reply.deadly == 0:
                self.faults.die()
            self._metrics.observe("request_queue_time", time.perf_counter() - came)
            if self.faults.hang or self.faults.stuck:
                await self.faults.hold(gone)
            if gone.done() and not gone.cancelled():
                self.aborted += 1
            elif reply.stream:
                if not early:
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM})
                self._metrics.observe("time_to_first_token", time.perf_counter() - came + self._gap)
                self._metrics.observe("inter_token_latency", self._gap)  # one a stream: more would slow it down
                await self._stream(reply, seat, gone, send)
            else:
                await self._whole(reply, seat, gone, send)
            self._metrics.ended(seat.prompt, max(0.0, seat.computed_at - seat.began))
        finally:
            self._queue.leave(seat)
            self._seeds.pop(seat)

    async def _whole(self, reply: AnyReply, seat: Seat, gone: asyncio.Future[None], send: Send) -> None:
        for number in range(1, reply.tokens + 1):
            await self._pause(number, gone)
            if self.faults.hang or self.faults.stuck:
                await self.faults.hold(gone)
            if gone.done():
                self.aborted += 1
                if not gone.cancelled():
                    return None
                reply.tokens = number - 1
                break
            if self.faults.dead:
                return await answer(send, 500, ENGINE_DEAD)
            if number == reply.deadly:
                self.faults.die()
            self._metrics.generated += reply.choices
            seat.made = number
        return await answer(send, 200, reply.whole())

    async def _stream(self, reply: AnyReply, seat: Seat, gone: asyncio.Future[None], send: Send) -> None:
        if first := reply.first():
            await send({"type": "http.response.body", "body": first, "more_body": True})
        chunk, gap, faults, burst = reply.chunk, self._gap, self.faults, self._burst
        held: list[bytes] = []
        for number in range(1, reply.tokens + 1):
            if gap:
                await self._pause(number, gone)
            elif not number % _YIELD_EACH:
                await asyncio.sleep(0)
            if gone.done():
                self.aborted += 1
                if not gone.cancelled():
                    return None
                reply.tokens = number - 1
                break
            if faults.in_streams:
                await _flush(held, send)
                if await faults.strike(number, gone):
                    return await send({"type": "http.response.body", "body": ENGINE_DEAD_EVENT, "more_body": False})
                if number == faults.end_after:
                    return await send({"type": "http.response.body", "body": b"", "more_body": False})
            if number == reply.deadly:
                faults.die()
            self._metrics.generated += reply.choices
            seat.made = number
            for index in range(reply.choices):
                held.append(chunk(number, index))
                if gap or len(held) >= burst:
                    await _flush(held, send)
        await _flush(held, send)
        await send({"type": "http.response.body", "body": reply.last(), "more_body": False})
        return None

    async def _pause(self, number: int, gone: asyncio.Future[None]) -> None:
        """Until this token is due, or the client has left."""
        gap = self._gap
        if not gap or (number == 1 and self._queue.in_steps):
            return  # the step that ends a prefill has the first token
        if gap >= _SLOW_S:
            gap -= asyncio.get_running_loop().time() % _STEP_S
        await asyncio.wait((gone,), timeout=gap)
        await self._queue.step_over(gone)

    async def _change_faults(self, body: bytes, send: Send) -> None:
        """`POST /fault`: switches those that are named; answers with all, and with what has become of requests."""
        try:
            self.faults.change(msgspec.json.decode(body) if body else {})
        except (*_WRONG, TypeError) as wrong:
            return await answer(send, 400, msgspec.json.encode({"error": str(wrong)}))
        self._metrics.counters()  # those that are to stand still do from now on
        counts = {name: getattr(self, name) for name in ("running", "waiting", "aborted", "resumed", "wrong_resumes")}
        told = {"faults": self.faults.as_dict(), **counts, "seeds": list(self._seeds.values())}
        await answer(send, 200, msgspec.json.encode(told))
        if self.faults.refuse_s is not None and self.on_refuse is not None:
            seconds, self.faults.refuse_s = self.faults.refuse_s, None
            await self.on_refuse(seconds)
        if self.faults.drain_s is not None and self.on_drain is not None:
            seconds, self.faults.drain_s = self.faults.drain_s, None
            self.on_drain(seconds)
        return None


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

    def drain(seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, setattr, server, "should_exit", True)

    engine.on_refuse, engine.on_drain = refuse, drain
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, drain, _DRAIN_S)
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
@click.option("--prefill-tokens-per-second", type=float, help="Prefill by the prompts' lengths instead, in steps.")
@click.option("--max-num-seqs", type=int, help="Requests at once; the others wait in order of arrival.")
@click.option("--num-gpu-blocks", "blocks", type=int, default=4096, show_default=True, help="KV cache, of 16 tokens.")
@click.option(
    "--tell-max-num-seqs/--no-tell-max-num-seqs",
    default=True,
    show_default=True,
    help="Whether /metrics tells it, as our engines' does and plain vLLM's doesn't.",
)
@click.option("--early-headers", is_flag=True, help="A stream's headers come before its turn, as vLLM sends them.")
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
@click.option("--stuck", is_flag=True, help="A fault: no tokens, though HTTP answers.")
@click.option("--metrics", type=click.Choice(get_args(MetricsLie)), help="A fault: what /metrics does instead.")
@click.option("--status", type=int, help="A fault: every request gets this error.")
@click.option("--dead", is_flag=True, help="A fault: says in every stream that its engine is dead.")
@click.option("--poison", help="A fault: a prompt with this text in it ends the process.")
@click.option("--poison-at", type=int, default=0, help="Not at once, but at this token of its reply.")
@click.option("--poison-after", type=int, default=0, help="Or at so many tokens of it made here.")
@click.option("--usage-lie", type=int, default=0, help="A fault: so many tokens more are told.")
@click.option("--sse", type=click.Choice(get_args(SseForm)), help=_SSE_HELP)
def main(
    host: str,
    port: int | None,
    tokenizer_folder: Path | None,
    tokens_per_second: float | None,
    prefill_s: float,
    prefill_tokens_per_second: float | None,
    max_num_seqs: int | None,
    blocks: int,
    early_headers: bool,
    tell_max_num_seqs: bool,
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
    stall_after, hang, stuck, metrics, status, dead, poison, poison_at, poison_after, usage_lie, refuse_s, drain_s,
    sse).
    """
    if tokenizer_folder is not None:
        from synthia_vllm.bench.null.tokenizer import write

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
        prefill_tokens_per_second=prefill_tokens_per_second,
        max_num_seqs=max_num_seqs,
        blocks=blocks,
        early_headers=early_headers,
        tell_max_num_seqs=tell_max_num_seqs,
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
