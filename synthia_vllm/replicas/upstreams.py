"""Engines that run elsewhere and are left alone: no canaries, no resume."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import structlog

from synthia_vllm.engine.port import Capacity, Delta, Generation, Sampling
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import RequestError, SetupError, UpstreamLost, UpstreamTimeout
from synthia_vllm.metrics.replicas import ReplicaView, engine_name
from synthia_vllm.replicas.attempt import Attempt, AttemptLost
from synthia_vllm.replicas.counters import ask_counters
from synthia_vllm.replicas.detect import Endpoint, detect, least_context
from synthia_vllm.replicas.http import EngineRefused, open_session, own_headers, request_headers
from synthia_vllm.replicas.kinds import reply_of
from synthia_vllm.replicas.models import ModelList
from synthia_vllm.replicas.transcript import Transcript

_RESTING_S = 5.0  # an upstream that refused a connection is asked again after so long
_CAPACITY_TIMEOUT_S = 5.0
_READY_DEADLINE_S = 5.0
_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Target:
    endpoint: Endpoint
    name: str  # in metrics: host, port and path
    in_flight: int = 0
    resting_until: float = 0.0
    detecting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Upstreams:
    """Generates on engines elsewhere; on the one with the fewest requests in flight.

    Raises UpstreamLost (502) where none accepts a connection, or one breaks off, and UpstreamTimeout (504) where
    nothing comes for `read_timeout` seconds. Only refused connections are tried elsewhere: anything later may have been
    begun. `async with` opens and closes the connections.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        tokenizer: Tokenizer | None = None,
        context: int | None = None,
        key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
    ) -> None:
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise SetupError(f"--upstream {url}: a URL like http://127.0.0.1:8001")
        self._targets = [_Target(Endpoint(url.rstrip("/")), engine_name(url)) for url in urls]
        self.tokenizer = tokenizer  # None: prompts go as text
        self.headers = own_headers(key)  # of every question; `key` is what the engines themselves ask for
        self.root: str | None = None  # unknown until an engine tells it
        self.context = context  # None: unknown until an engine tells it
        self._context_is_set = context is not None
        self._timeouts = connect_timeout, read_timeout
        self._session: aiohttp.ClientSession
        self._models = ModelList(self.headers, lambda: self._session)
        self._canaries = 0

    async def __aenter__(self) -> "Upstreams":
        self._session = open_session(*self._timeouts)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._models.close()
        await self._session.close()

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        for target in self._by_load():
            target.in_flight += 1
            begun = False
            try:
                attempt = Attempt(
                    self._session,
                    target.endpoint,
                    request_headers(self.headers, generation.id, 1, generation.on_attempt(target.name)),
                )
                with attempt:
                    await self._known(target)
                reply = reply_of(target.endpoint, generation, Transcript(generation, self.tokenizer))
                async with aclosing(reply.read(attempt)) as deltas:
                    async for delta in deltas:
                        begun = True
                        delta.replica = target.name
                        yield delta
            except AttemptLost as loss:
                if not loss.refused:
                    raise _error_of(loss) from None
                target.resting_until = time.monotonic() + _RESTING_S
                _log.warning("upstream_refuses", upstream=target.endpoint.url, error=loss.detail)
            except EngineRefused as refused:
                if refused.status in (404, 405):
                    target.endpoint.kind = None  # what is there now is something else
                raise UpstreamLost(str(refused)) if begun else refused.as_error() from None
            else:
                return
            finally:
                target.in_flight -= 1
        raise UpstreamLost("no engine can be reached")

    async def models(self) -> Sequence[str]:
        return await self._models.of([target.endpoint for target in self._targets])

    async def ready(self) -> bool:
        """Asks for one token."""
        self._canaries += 1
        sampling = Sampling(max_tokens=1, temperature=0.0)
        canary = Generation(id=f"synthia-ready-{id(self)}-{self._canaries}", prompt=[1], sampling=sampling)
        try:
            async with asyncio.timeout(_READY_DEADLINE_S), aclosing(self.generate(canary)) as deltas:
                async for _ in deltas:
                    pass
        except (TimeoutError, RequestError):
            return False
        return True

    async def capacity(self) -> Capacity | None:
        """What the KV caches of all engines hold, by vLLM's own metric; None if any does not tell."""
        total = 0
        for target in self._targets:
            try:
                async with asyncio.timeout(_CAPACITY_TIMEOUT_S):
                    counters = await ask_counters(target.endpoint.url, self._session, self.headers)
            except (aiohttp.ClientError, TimeoutError):
                return None
            if counters is None or counters.cache_tokens is None:
                return None
            total += counters.cache_tokens
        return Capacity(total)

    def replicas(self) -> list[ReplicaView]:
        """The engines as replicas: `out` while one rests that refused a connection."""
        now = time.monotonic()
        return [
            ReplicaView(
                target.name, target.endpoint.url, "out" if target.resting_until > now else "up", target.in_flight
            )
            for target in self._targets
        ]

    def _by_load(self) -> list[_Target]:
        """All, the least busy first; those that refused of late last, to be tried only if nothing else is there."""
        now = time.monotonic()
        return sorted(self._targets, key=lambda target: (target.resting_until > now, target.in_flight))

    async def _known(self, target: _Target) -> None:
        """Finds out what kind of engine it is, once."""
        if target.endpoint.kind is None:
            async with target.detecting:
                if target.endpoint.kind is None:
                    await detect(target.endpoint, self._session, self.headers, tokens=self.tokenizer is not None)
                    self.root = self.root or target.endpoint.root
                    if not self._context_is_set:
                        self.context = least_context(target.endpoint for target in self._targets)


def _error_of(loss: AttemptLost) -> UpstreamLost:
    if loss.reason == "hung":
        return UpstreamTimeout("the engine sent nothing for too long")
    return UpstreamLost(f"the engine broke off: {loss.detail}" if loss.detail else "the engine broke off")
