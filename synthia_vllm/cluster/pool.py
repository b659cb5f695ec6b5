"""The replicas as one upstream: who is there, who is well, and who takes the next request."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field

import aiohttp
import structlog
from starlette.types import Receive, Scope, Send

from synthia_vllm.cluster.exchange import Exchange
from synthia_vllm.cluster.replica import LossReason, Replica
from synthia_vllm.cluster.routing import Affinity, Router
from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.forwarding import (
    answer_lifespan,
    cache_tokens,
    open_session,
    own_headers,
    while_client_stays,
    whole_body,
)
from synthia_vllm.gateway.replies import send_error, send_json
from synthia_vllm.metrics.replicas import ReplicaView
from synthia_vllm.settings import ClusterSettings

_TICK_S = 0.2
_PATIENCE_S = 2.0  # between two words to a client that waits for a replica
_FAILED_AGAIN_S = 0.5  # a replica that is not up is asked again so soon
_CANARY = {"prompt": [1], "max_tokens": 1, "temperature": 0}

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Waiter:
    affinity: Affinity | None
    avoid: Set[Replica]
    on_trial: bool
    given: "asyncio.Future[Replica]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ReplicaPool:
    """An ASGI app that answers from the replicas it is told of, and goes on from another when one is lost.

    A replica takes requests from the moment that it has answered a canary, one generated token, and is asked for
    another whenever it has sent nothing for a while. Without it by the deadline the replica is out, and what ran on
    it goes on elsewhere (`synthia_vllm.cluster.exchange`). Replicas that are not listed any more drain.

    Requests wait in order of arrival while no replica is up, at most `start_wait_s`: 503 after that. `async with` opens
    the connections and watches the replicas. `on_capacity` is told when what all of them hold changes.
    """

    tells_readiness = True  # to `Gateway`: answers /ready itself, from its canaries

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
    ) -> None:
        self.settings = settings
        self.key = key  # that the replicas ask for
        self.headers = own_headers(key)
        self.on_capacity: Callable[[Capacity], None] | None = None
        self.session: aiohttp.ClientSession
        self.tokens_per_replica: int | None = None  # KV cache of one, as the last one told
        self._timeouts = connect_timeout, read_timeout
        self._router = Router(settings.routing, settings.max_load_factor)
        self._replicas: dict[str, Replica] = {}
        self._waiters: deque[_Waiter] = deque()
        self._told: Capacity | None = None

    async def __aenter__(self) -> "ReplicaPool":
        self._loop = asyncio.get_running_loop()
        self.session = open_session(*self._timeouts)
        self._watch = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._watch, *(replica.canary for replica in self._replicas.values() if replica.canary)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()

    def update(self, listed: Mapping[str, str]) -> None:
        """Tells which replicas there are: name to base URL, with vLLM's routes under it."""
        for name, url in listed.items():
            if name not in self._replicas:
                replica = self._replicas[name] = Replica(name, url.rstrip("/"), last_heard=self._loop.time())
                _log.info("replica_listed", replica=name, url=url)
                self._ask(replica)
            elif self._replicas[name].draining_since is not None:
                self._replicas[name].draining_since = None
                self._prove(self._replicas[name])
        for replica in list(self._replicas.values()):
            if replica.name not in listed and replica.draining_since is None:
                _log.info("replica_drains", replica=replica.name, in_flight=replica.in_flight)
                replica.draining_since = self._loop.time()
                replica.state = "draining"
                self._forget_if_idle(replica)
        self._tell_capacity()

    def replicas(self) -> list[ReplicaView]:
        """For the exporter and the live view."""
        return [replica.view() for replica in self._replicas.values()]

    def up(self) -> set[Replica]:
        return {replica for replica in self._replicas.values() if replica.state == "up"}

    @property
    def waiting(self) -> int:
        """Requests that wait for a replica."""
        return len(self._waiters)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await answer_lifespan(receive, send)
        if scope["path"] == "/health":
            return await send_json(200, {}, send)
        if scope["path"] == "/ready":
            if not self.up():
                return await send_error(_nobody(), send)
            return await send_json(200, {"replicas": len(self.up())}, send)
        body = await whole_body(receive)
        if body is not None:
            await while_client_stays(Exchange(self, scope, body, send).run(), receive)
        return None

    async def acquire(
        self,
        affinity: Affinity | None,
        avoid: Set[Replica] = frozenset(),
        *,
        wait: bool = True,
        on_trial: bool = False,
        on_wait: Callable[[float], Awaitable[None]] | None = None,
    ) -> Replica:
        """A replica for one request, to be released after it. `on_wait` is called while there is none, with seconds.

        With `on_trial`, one where no other request is on trial. Raises Overloaded where none comes in time, or none is
        there and `wait` is off.
        """
        if all(waiter.on_trial for waiter in self._waiters):
            replica = self._pick(affinity, avoid, on_trial)
            if replica is not None:
                return self._take(replica, on_trial)
        if not wait:
            raise _nobody()
        began, waiter = self._loop.time(), _Waiter(affinity, avoid, on_trial)
        self._waiters.append(waiter)
        try:
            while not (await asyncio.wait((waiter.given,), timeout=_PATIENCE_S))[0]:
                waited = self._loop.time() - began
                if waited > self.settings.start_wait_s:
                    break
                if on_wait is not None:
                    await on_wait(waited)
            else:
                return waiter.given.result()
        except BaseException:
            if waiter.given.done():
                self.release(waiter.given.result(), on_trial)
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        raise _nobody()

    def release(self, replica: Replica, on_trial: bool = False) -> None:
        """`on_trial` as in `acquire`, unless it was acquitted."""
        replica.in_flight -= 1
        if on_trial:
            replica.on_trial = False
        self._forget_if_idle(replica)
        self._hand_out()

    def acquit(self, replica: Replica) -> None:
        """A request on trial had a token: others may be tried there."""
        replica.on_trial = False
        self._hand_out()

    def heard(self, replica: Replica) -> None:
        """A byte came: the replica lives."""
        replica.last_heard = self._loop.time()

    def lost(self, replica: Replica, reason: LossReason) -> None:
        """A request lost this replica: whether others did is found out now."""
        if reason != "drained" and replica.state == "up":
            self._prove(replica)

    def _prove(self, replica: Replica) -> None:
        """Gives it no more requests until it has answered a canary."""
        replica.state = "unproven"
        self._tell_capacity()
        self._ask(replica)

    def _pick(self, affinity: Affinity | None, avoid: Set[Replica], on_trial: bool) -> Replica | None:
        now = self._loop.time()
        free = [
            replica
            for replica in self._replicas.values()
            if replica.state == "up"
            and not (on_trial and replica.on_trial)
            and replica.in_flight < replica.limit(now, self.settings.slow_start_s)
        ]
        return self._router.pick([replica for replica in free if replica not in avoid] or free, affinity)

    def _take(self, replica: Replica, on_trial: bool) -> Replica:
        replica.in_flight += 1
        replica.on_trial = replica.on_trial or on_trial
        return replica

    def _hand_out(self) -> None:
        """Gives replicas to those who wait, the longest first."""
        for waiter in list(self._waiters):
            replica = self._pick(waiter.affinity, waiter.avoid, waiter.on_trial)
            if replica is None and not waiter.on_trial:
                return
            if replica is not None:
                self._waiters.remove(waiter)
                waiter.given.set_result(self._take(replica, waiter.on_trial))

    async def _run(self) -> None:
        while True:
            now = self._loop.time()
            for replica in list(self._replicas.values()):
                self._look_after(replica, now)
            if self._waiters:
                self._hand_out()  # a new replica may take more than a moment ago
            await asyncio.sleep(_TICK_S)

    def _look_after(self, replica: Replica, now: float) -> None:
        up = replica.state in ("up", "draining")
        silent_since = max(replica.last_heard, replica.asked_at)
        if now - silent_since >= (self.settings.canary_period_s if up else _FAILED_AGAIN_S):
            self._ask(replica)
        since = replica.draining_since
        if since is not None and now - since >= self.settings.handover_s and self.up():
            replica.take_legs_away("drained", only_movable=True)

    def _ask(self, replica: Replica) -> None:
        if replica.canary is None or replica.canary.done():
            replica.asked_at = self._loop.time()
            replica.canary = asyncio.create_task(self._canary(replica))

    async def _canary(self, replica: Replica) -> None:
        """Asks for one token, and learns what the replica holds when it is new."""
        began = self._loop.time()
        try:
            async with asyncio.timeout(self.settings.canary_deadline_s):
                body = {"model": await self._model(replica), **_CANARY}
                async with self.session.post(f"{replica.url}/v1/completions", json=body, headers=self.headers) as reply:
                    await reply.read()
                    answered = reply.status == 200
                if answered and replica.tokens is None:
                    replica.tokens = await self._cache_size(replica)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError)
            if refused or replica.last_heard <= began:
                # A connection that breaks, also a canary's, is a death; silence is a hang.
                self._out(replica, "hung" if isinstance(error, TimeoutError) else "died")
            return
        if not answered:
            if replica.last_heard <= began:
                self._out(replica, "error")
            return
        self.heard(replica)
        if replica.state in ("unproven", "out"):
            _log.info("replica_up", replica=replica.name)
            replica.state = "up"
            replica.up_since = replica.up_since or self._loop.time()
            self._tell_capacity()
            self._hand_out()

    def _out(self, replica: Replica, reason: LossReason) -> None:
        if replica.state == "up" or replica.legs:
            _log.warning("replica_out", replica=replica.name, reason=reason, in_flight=replica.in_flight)
        if replica.state != "draining":
            replica.state = "out"
            self._tell_capacity()
        if reason == "hung" and not self.up():
            # It may be slow and not dead, and elsewhere is nobody: what it has it can only lose. The next canary, soon,
            # asks again.
            return
        replica.take_legs_away(reason)

    async def _model(self, replica: Replica) -> str | None:
        """The model's name, asked for once: engines other than vLLM want it in every request."""
        if replica.model is None:
            async with self.session.get(f"{replica.url}/v1/models", headers=self.headers) as reply:
                models = (await reply.json()).get("data") or [{}]
            replica.model, replica.context = models[0].get("id"), models[0].get("max_model_len")
        return replica.model

    async def _cache_size(self, replica: Replica) -> int | None:
        async with self.session.get(f"{replica.url}/metrics", headers=self.headers) as reply:
            text = await reply.text()
        try:
            return cache_tokens(text)
        except ValueError:
            return None  # no metrics, or not vLLM's

    def _forget_if_idle(self, replica: Replica) -> None:
        if replica.draining_since is not None and not replica.in_flight:
            if replica.canary is not None:
                replica.canary.cancel()
            self._replicas.pop(replica.name, None)

    def _tell_capacity(self) -> None:
        """Unknown, and then unbounded, while no replica is up: who comes then waits here, not in the fair queue."""
        held = [replica.tokens for replica in self.up()]
        known = [tokens for tokens in held if tokens is not None]
        if known:
            self.tokens_per_replica = known[-1]
        capacity = Capacity(sum(known) if known and len(known) == len(held) else None)
        if capacity != self._told:
            self._told = capacity
            if self.on_capacity is not None:
                self.on_capacity(capacity)


def _nobody() -> Overloaded:
    return Overloaded("no replica is up", _PATIENCE_S)
