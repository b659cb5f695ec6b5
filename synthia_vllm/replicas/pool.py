"""The replicas as one engine: who is there, who is well, and who takes the next request."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Set
from typing import Any

import aiohttp
import msgspec
import structlog

from synthia_vllm.engine.port import Affinity, Capacity, Delta, Generation
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import Overloaded
from synthia_vllm.metrics.replicas import ReplicaView
from synthia_vllm.replicas.attempt import LossReason
from synthia_vllm.replicas.detect import COMPLETIONS, GENERATE, Endpoint, detect, least_context
from synthia_vllm.replicas.http import EngineRefused, cache_size, open_session, own_headers
from synthia_vllm.replicas.models import ModelList
from synthia_vllm.replicas.replica import Replica, Waiter
from synthia_vllm.replicas.routing import Router
from synthia_vllm.replicas.sequence import PooledSequence
from synthia_vllm.settings import ClusterSettings

_TICK_S = 0.2
_RETRY_AFTER_S = 2.0
_FAILED_AGAIN_S = 0.5  # a replica that is not up is asked again so soon
_CANARY = {"max_tokens": 1, "temperature": 0}

_log = structlog.get_logger(__name__)


class ReplicaPool:
    """An engine that generates on the replicas it is told of, and goes on from another when one is lost.

    A replica takes requests from the moment that it has answered a canary, one generated token, and is asked for
    another whenever it has sent nothing for a while. Without it by the deadline the replica is out, and what ran on
    it goes on elsewhere (`synthia_vllm.replicas.sequence`). Replicas that are not listed any more drain.

    Requests wait in order of arrival while no replica is up, at most `start_wait_s`: 503 after that. `async with` opens
    the connections and watches the replicas. `on_capacity` is told when what all of them hold changes.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        tokenizer: Tokenizer | None = None,
        context: int | None = None,
        names: Sequence[str] = (),
        key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer  # None: prompts go as text
        self.headers = own_headers(key)  # of every question to a replica; `key` is what they ask for
        self.on_capacity: Callable[[Capacity], None] | None = None
        self.session: aiohttp.ClientSession
        self.tokens_per_replica: int | None = None  # KV cache of one, as the last one told
        self.root: str | None = None  # unknown until a replica tells it
        self.context = context  # None: unknown until a replica tells it
        self._context_is_set = context is not None
        self._timeouts = connect_timeout, read_timeout
        self._router = Router(settings.routing, settings.max_load_factor)
        self._replicas: dict[str, Replica] = {}
        self._waiters: deque[Waiter] = deque()
        self._told: Capacity | None = None
        # Names hold while no replica is up: who asks for one of them waits here.
        self._models = ModelList(self.headers, lambda: self.session, names=names, keep=True)

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
        await self._models.close()
        await self.session.close()

    def update(self, listed: Mapping[str, str]) -> None:
        """Tells which replicas there are: name to base URL, with vLLM's routes under it."""
        for name, url in listed.items():
            if name not in self._replicas:
                endpoint = Endpoint(url.rstrip("/"))
                replica = self._replicas[name] = Replica(name, endpoint, last_heard=self._loop.time())
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

    # The engine port

    def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        return PooledSequence(self, generation).deltas()

    async def models(self) -> Sequence[str]:
        found = list(self._replicas.values())
        return await self._models.of([one.endpoint for one in found if one.state == "up" or not self.up()])

    async def ready(self) -> bool:
        return bool(self.up())

    # For `PooledSequence`

    def queue(self, affinity: Affinity | None, avoid: Set[Replica], *, on_trial: bool) -> Waiter:
        """Asks for a replica, which is given at once where one is free. `leave` must follow, or `release`.

        With `on_trial`, one where no other request is on trial.
        """
        waiter = Waiter(affinity, avoid, on_trial, self._loop.time())
        if all(other.on_trial for other in self._waiters):
            replica = self._pick(affinity, avoid, on_trial)
            if replica is not None:
                waiter.given.set_result(self._take(replica, on_trial))
                return waiter
        self._waiters.append(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Gives up to wait."""
        if waiter.given.done():
            self.release(waiter.given.result(), waiter.on_trial)
        elif waiter in self._waiters:
            self._waiters.remove(waiter)

    def waited(self, waiter: Waiter) -> float:
        """For how many seconds. Raises Overloaded where that is too long."""
        seconds = self._loop.time() - waiter.began
        if seconds > self.settings.start_wait_s:
            raise Overloaded("no replica is up", _RETRY_AFTER_S)
        return seconds

    def release(self, replica: Replica, on_trial: bool = False) -> None:
        """`on_trial` as in `queue`, unless it was acquitted."""
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

    # Who is well

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
                if not waiter.given.done():  # cancelled, and not gone yet
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
            replica.take_attempts_away("drained", only_movable=True)

    def _ask(self, replica: Replica) -> None:
        if replica.canary is None or replica.canary.done():
            replica.asked_at = self._loop.time()
            replica.canary = asyncio.create_task(self._canary(replica))

    async def _canary(self, replica: Replica) -> None:
        """Asks for one token, and learns what the replica is and holds when it is new."""
        began = self._loop.time()
        try:
            async with asyncio.timeout(self.settings.canary_deadline_s):
                answered = await self._one_token(replica.endpoint)
                if answered and replica.tokens is None:
                    replica.tokens = await cache_size(replica.endpoint.url, self.session, self.headers)
        except (aiohttp.ClientError, TimeoutError) as error:
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
            _log.info("replica_up", replica=replica.name, speaks=replica.endpoint.kind)
            replica.state = "up"
            replica.up_since = replica.up_since or self._loop.time()
            self._tell_capacity()
            self._hand_out()

    async def _one_token(self, endpoint: Endpoint) -> bool:
        if endpoint.kind is None:
            try:
                await detect(endpoint, self.session, self.headers, tokens=self.tokenizer is not None)
                self.root = self.root or endpoint.root
                if not self._context_is_set:
                    self.context = least_context(replica.endpoint for replica in self._replicas.values())
            except EngineRefused:
                return False
        body: dict[str, Any]
        if endpoint.kind == "generate":
            path, body = GENERATE, {"token_ids": [1], "sampling_params": _CANARY}
        else:
            path, body = COMPLETIONS, {"model": endpoint.model(""), "prompt": [1], **_CANARY}
        data, headers = msgspec.json.encode(body), {**self.headers, "Content-Type": "application/json"}
        async with self.session.post(endpoint.url + path, data=data, headers=headers) as reply:
            await reply.read()
            if reply.status in (404, 405):
                endpoint.kind = None  # what is there now is something else
            return reply.status == 200

    def _out(self, replica: Replica, reason: LossReason) -> None:
        if replica.state == "up" or replica.attempts:
            _log.warning("replica_out", replica=replica.name, reason=reason, in_flight=replica.in_flight)
        if replica.state != "draining":
            replica.state = "out"
            self._tell_capacity()
        if reason == "hung" and not self.up():
            # It may be slow and not dead, and elsewhere is nobody: what it has it can only lose. The next canary, soon,
            # asks again.
            return
        replica.take_attempts_away(reason)

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
