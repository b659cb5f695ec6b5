"""Whether a request would be answered in time, which `/health` does not tell."""

import asyncio
from collections.abc import Callable, Iterable
from time import perf_counter

from synthia_vllm.engine.port import Engine
from synthia_vllm.gateway.request import Exchange, Observer, Usage

_FRESH_S = 5.0  # a token is proof for so long
_AT_ONCE_S = 1.0  # an engine that refuses does so at once; later, what is asked for waits in line
_PATIENCE_S = 0.5  # a probe does not wait longer for an engine that is at work
_SLACK = 2.0  # prompts may take so many times as long as they did of late
_LEARNING_RATE = 0.2


class Readiness(Observer):
    """True if the engine has generated a token in the last seconds, or does so when it is asked, or is at work.

    A busy engine can't answer in time, and is judged by what it does: it is at work as long as the last token, or the
    first of the requests that it has, is not further back than those seconds and the time in which it reads the prompts
    that it has to read, `max_wait` at the most. One that refuses is not ready, whatever it did before.

    `usages` are those of requests under way. Probes that come together ask once.
    """

    def __init__(self, engine: Engine, *, usages: Callable[[], Iterable[Usage]], max_wait: float = 60.0) -> None:
        self.engine = engine
        self.max_wait = max_wait
        self._usages = usages
        self._proved = float("-inf")
        self._prompt_tokens = 0.0  # of a request, and seconds until its first token: means of late
        self._prompt_seconds = 0.0
        self._asking: asyncio.Task[bool] | None = None

    async def __call__(self) -> bool:
        at_work = self._at_work()
        if self._proved >= perf_counter() - _FRESH_S:
            return True
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait((self._asking,), timeout=_PATIENCE_S if at_work else None)
        return self._asking.result() if self._asking.done() else self._at_work()

    def ended(self, exchange: Exchange) -> None:
        usage = exchange.usage
        self._note(usage)
        if usage.dispatched is not None and usage.first_token is not None:
            tokens, seconds = max(1, usage.prompt - usage.cached), usage.first_token - usage.dispatched
            rate = _LEARNING_RATE if self._prompt_tokens else 1.0
            self._prompt_tokens += rate * (tokens - self._prompt_tokens)
            self._prompt_seconds += rate * (seconds - self._prompt_seconds)

    def _at_work(self) -> bool:
        unread, since = 0, float("inf")
        for usage in self._usages():
            self._note(usage)
            if usage.dispatched is not None and not usage.completed:
                since = min(since, usage.dispatched)
                unread += usage.prompt if usage.first_token is None else 0
        if since == float("inf"):
            return False
        allowed = self.max_wait
        if self._prompt_tokens:
            seconds = self._prompt_seconds * unread / self._prompt_tokens
            allowed = min(allowed, _FRESH_S + _SLACK * seconds)
        return max(self._proved, since) >= perf_counter() - allowed

    def _note(self, usage: Usage) -> None:
        self._proved = max(self._proved, usage.last_token or float("-inf"))

    async def _ask(self) -> bool:
        asked = perf_counter()
        ready = await self.engine.ready()
        now = perf_counter()
        if ready:
            self._proved = now
        return ready or (now - asked > _AT_ONCE_S and self._at_work())
