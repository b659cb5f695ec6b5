"""The API routes of a gateway: what generates, what it answers itself, and which models there are."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from starlette.types import Receive, Send

from synthia_vllm.api import abort
from synthia_vllm.api.base import AnsweringApi, Asker, GeneratingApi, Model, Prepared, decode
from synthia_vllm.api.chat import ChatCompletions
from synthia_vllm.api.completions import Completions
from synthia_vllm.api.errors import anthropic_form, form_of
from synthia_vllm.api.gathered import Gathered
from synthia_vllm.api.messages import CountTokens, Messages, model_info, model_page
from synthia_vllm.api.responses import Responses
from synthia_vllm.api.sampling import constraint_param
from synthia_vllm.api.tokens import Detokenize, Tokenize
from synthia_vllm.engine.grammar import refusal_of_engine
from synthia_vllm.engine.port import Engine
from synthia_vllm.errors import Forbidden, ModelNotFound, NotFound, ReplyNotKept, RequestError, UpstreamLost
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.delivery import Delivery
from synthia_vllm.gateway.edge.replies import send_json
from synthia_vllm.gateway.journal.resumption import Release, Resumption
from synthia_vllm.gateway.journal.store import Journals, digest_of
from synthia_vllm.gateway.limits.layer import Arrivals
from synthia_vllm.gateway.own_usage import is_usage
from synthia_vllm.gateway.request import Exchange, Layer, Observer, Request
from synthia_vllm.gateway.under_way import UnderWay
from synthia_vllm.prompt import MODEL_ALIASES
from synthia_vllm.settings import PromptSettings

GENERATING: tuple[GeneratingApi, ...] = (ChatCompletions(), Completions(), Responses(), Messages())
ANSWERING: tuple[AnsweringApi, ...] = (CountTokens(), Tokenize(), Detokenize())
MODELS = "/v1/models"
# Bodies from this size on are read, rendered and tokenized in a thread: the event loop is everybody's.
_NUMBER = re.compile(rb"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_LONG_BODY = 16 * 1024
_WORK = 2048  # bytes of a body that are more work than a look at its user's limits

T = TypeVar("T")
# Told of each time that an engine is asked: the replica, and for which of the sequences. Gives the trace headers.
Attempt = Callable[[Exchange, str, int], Mapping[str, str]]
# What the engine's prefix cache is salted with, for whom and given a salt of the client's own.
Salt = Callable[[Account, str | None], str | None]


async def nothing_held(user: str, exchange: str) -> None:
    """The release where there are no limits."""


class Apis:
    """Answers the API routes for a user who is known. Raises RequestError."""

    def __init__(
        self,
        engine: Engine,
        layer: Layer,
        prompt: PromptSettings,
        *,
        observers: Sequence[Observer] = (),
        arrivals: Arrivals | None = None,
        on_attempt: Attempt = lambda exchange, replica, sequence: exchange.trace,
        salt: Salt = lambda account, given: None,
        keep_bodies: bool = False,
        journals: Journals | None = None,
        release: Release = nothing_held,
    ) -> None:
        self.engine = engine
        self.layer = layer
        self._prompt = prompt
        self._observers = observers
        self._arrivals = arrivals
        self._on_attempt = on_attempt
        self._salt = salt
        self._keep_bodies = keep_bodies
        self._journals = journals
        self._release = release
        self._generating = {api.path: api for api in GENERATING}
        self._answering = {api.path: api for api in ANSWERING}
        self._under_way = UnderWay()
        self._told = False  # an engine has told what it serves
        self._started = int(time.time())

    async def look(self, exchange: Exchange, length: int | None) -> None:
        """Before a body of so many bytes is read, unknown for None. Raises LimitExceeded for one not worth its work."""
        if self._arrivals is None:
            return
        if exchange.route == abort.PATH:
            return
        if exchange.route in self._answering or is_usage(exchange.route):
            await self._arrivals.count(exchange.account, exchange.id)
        elif length is None or length >= _WORK:
            await self._arrivals.look(exchange.account)

    async def answer(
        self,
        exchange: Exchange,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        *,
        unbounded: bool = False,
        on_read: Callable[[], None] = lambda: None,
    ) -> bool:
        """True where the whole reply went out; False where it broke off in a stream. `unbounded`: as in Delivery.

        `on_read` is told when the body that was sent is needed no longer.
        """
        route = exchange.route
        if exchange.method != "POST":
            await self._tell_models(exchange, send, anthropic=form_of(route, headers) is anthropic_form)
            return True
        assert exchange.body is not None
        if route == abort.PATH:
            await send_json(200, await self._abort(exchange), send)
            return True
        if (api := self._answering.get(route)) is not None:
            body = await self._answer(api, exchange)
            await send_json(200, body, send)
            return True
        generating = self._generating[route]
        try:
            request, constraint = await self._prepare(generating, exchange, headers)
            if not self._keep_bodies:  # a long one, beside a long reply, is memory for nothing
                exchange.body = None
                on_read()
            delivery = Delivery(exchange, request, self.layer, self._observers, unbounded=unbounded)
            if request.entry is not None:
                request.entry.on_taken = delivery.leave
            try:
                with self._under_way.running(exchange, delivery):
                    await delivery.run(receive, send)
                if request.entry is not None and not request.prepared.streamed and self._journals is not None:
                    await self._journals.forget(request.entry)
            except RequestError as error:
                if type(error) is not RequestError:
                    raise
                raise refusal_of_engine(error, constraint) from None
            return not delivery.failed
        finally:
            if self._arrivals is not None:
                self._arrivals.decided(exchange.id)

    async def _abort(self, exchange: Exchange) -> abort.Aborted:
        wanted = decode(exchange.body or b"", abort.AbortRequest).request_id
        return abort.Aborted(await self._under_way.abort(exchange.account.user, wanted))

    async def _answer(self, api: AnsweringApi, exchange: Exchange) -> bytes:
        model = await self._known_model()

        def work() -> bytes:
            request = api.decode(exchange.body or b"")
            self._check_model(exchange, request.model, model)
            return api.answer(request, model)

        return await _run(work, len(exchange.body or b""))

    async def _prepare(
        self, api: GeneratingApi, exchange: Exchange, headers: Mapping[bytes, bytes]
    ) -> tuple[Request, str | None]:
        """What is to be generated, and which of the client's fields constrains it."""
        queue_timeout = _seconds(headers.get(b"x-queue-timeout-s"))
        any_name = False
        try:
            model = await self._known_model()
        except UpstreamLost:
            if self._told:
                raise
            # No engine has told yet what it serves: whoever waits for one waits below. It has the last word.
            model, any_name = self._model_of(tuple(MODEL_ALIASES)), True

        def attempt(replica: str, sequence: int = 0) -> Mapping[str, str]:
            exchange.usage.replica = replica
            return self._on_attempt(exchange, replica, sequence)

        resumption = await self._resumption(exchange, headers)

        def work() -> tuple[Prepared, str | None]:
            run, created = resumption.run if resumption is not None else (exchange.id, int(exchange.arrived_at))
            asker = Asker(
                id=run,
                user=exchange.account.user,
                session=headers.get(b"x-session-id", b"").decode("latin-1"),
                salt=partial(self._salt, exchange.account),
                created=created,
                on_attempt=attempt,
            )
            request = api.decode(exchange.body or b"")
            self._check_model(exchange, request.model, model, any_name=any_name)
            prepared = api.prepare(request, model, asker)
            if prepared.streamed and (request.stream_interval or 1) > 1:
                prepared.reply = Gathered(prepared.reply, request.stream_interval)
            if len(prepared.sequences) > 1:
                prepared.sequences = [
                    replace(one, on_attempt=partial(attempt, sequence=number))
                    for number, one in enumerate(prepared.sequences)
                ]
            return prepared, constraint_param(request)

        length = len(exchange.body or b"")
        if self._arrivals is not None and length > _LONG_BODY:
            await self._arrivals.take_turn(exchange.account, exchange.id)
        prepared, constraint = await _run(work, length)
        entry, keeps_its_place = None, False
        if resumption is not None:
            if not prepared.streamed:
                if resumption.had is not None:
                    raise RequestError("a reply that is not streamed has no events", param="Last-Event-ID")
                if await resumption.claim_whole():  # it has an id of its own
                    prepared, constraint = await _run(work, length)
            entry, keeps_its_place = resumption.put(prepared, self.engine.tokenizer), resumption.keeps_its_place
        exchange.usage.prompt = prepared.prompt_tokens
        exchange.request = Request(
            exchange.id, exchange.account, prepared, exchange.usage, queue_timeout, entry, keeps_its_place
        )
        return exchange.request, constraint

    async def _resumption(self, exchange: Exchange, headers: Mapping[bytes, bytes]) -> Resumption | None:
        """What the journal has to do with it; None where nothing is kept of it. Claims what a client comes back for.

        Kept are replies to requests that have a name, by which their clients can come back.
        """
        last = headers.get(b"last-event-id", b"")
        if self._journals is None or not exchange.named:
            if last:
                why = "replies are not kept here (--limits.redis, --timeouts.reply-kept)"
                raise ReplyNotKept("it needs its X-Request-Id" if self._journals is not None else why)
            return None
        body = exchange.body or b""
        digest = await _run(partial(digest_of, exchange.route, body), len(body))
        resumption = Resumption(self._journals, self._release, exchange, digest)
        if last:
            await resumption.claim(last)
        return resumption

    async def _tell_models(self, exchange: Exchange, send: Send, *, anthropic: bool) -> None:
        """`GET /v1/models` and `/v1/models/{id}`: those that the key is for, in the form of the API that asks."""
        model = await self._known_model()
        allowed = exchange.account.models
        names = [name for name in model.names if allowed is None or name in allowed]
        if anthropic:
            found = [model_info(name, self._started, model.context) for name in names]
        else:
            found = [self._describe(name, model) for name in names]
        if exchange.route == MODELS:
            return await send_json(200, model_page(found) if anthropic else {"object": "list", "data": found}, send)
        wanted = unquote(exchange.route.removeprefix(f"{MODELS}/"))
        for one in found:
            if one["id"] == wanted:
                return await send_json(200, one, send)
        raise NotFound(exchange.route) if not wanted else ModelNotFound(wanted, [one["id"] for one in found])

    async def models(self) -> Sequence[str]:
        """The names that clients may ask for. Raises UpstreamLost where no engine tells."""
        own = await self.engine.models()
        self._told = True
        return *own, *(alias for alias in MODEL_ALIASES if alias not in own)

    async def _known_model(self) -> Model:
        return self._model_of(await self.models())

    def _model_of(self, names: Sequence[str]) -> Model:
        return Model(
            names=names,
            tokenizer=self.engine.tokenizer,
            context=self.engine.context,
            style=self._prompt.style,
            turn_end=self._prompt.turn_end,
            role_markers=self._prompt.role_markers,
        )

    def _check_model(self, exchange: Exchange, asked: str | None, model: Model, *, any_name: bool = False) -> None:
        exchange.model = asked or model.names[0]
        allowed = exchange.account.models
        if allowed is not None and exchange.model not in allowed:
            raise Forbidden(f"your key is for {', '.join(sorted(allowed))}, not for {exchange.model!r}", param="model")
        if not any_name and exchange.model not in model.names:
            raise ModelNotFound(exchange.model, model.names)

    def _describe(self, name: str, model: Model) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "synthia-vllm",
            "root": self.engine.root or model.names[0],
            "parent": None,
            "max_model_len": model.context,
        }


async def _run(work: Callable[[], T], length: int) -> T:
    """`work` on a body of so many bytes."""
    return await asyncio.to_thread(work) if length > _LONG_BODY else work()


def _seconds(value: bytes | None) -> float | None:
    if value is None:
        return None
    seconds = float(value) if _NUMBER.fullmatch(value) else -1.0  # Python's own rule takes `1_0`
    if not 0 < seconds < float("inf"):
        raise RequestError("X-Queue-Timeout-S is a number of seconds over 0", param="X-Queue-Timeout-S")
    return seconds
