"""The replicas as one engine: who is there, who is well, and who takes the next request."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence, Set
from typing import Any

import aiohttp
import msgspec
import structlog

from synthia_vllm.engine.port import Affinity, Capacity, Delta, Generation
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import Overloaded
from synthia_vllm.metrics.replicas import ReplicaView
from synthia_vllm.replicas.attempt import LossReason
from synthia_vllm.replicas.budget import RetryBudget
from synthia_vllm.replicas.counters import ask_counters
from synthia_vllm.replicas.detect import COMPLETIONS, GENERATE, Endpoint, detect, least_context
from synthia_vllm.replicas.health import Health
from synthia_vllm.replicas.http import EngineRefused, open_session, own_headers, refusal
from synthia_vllm.replicas.models import ModelList
from synthia_vllm.replicas.replica import Replica, Waiter
from synthia_vllm.replicas.routing import Router
from synthia_vllm.replicas.sequence import PooledSequence
from synthia_vllm.settings import ReplicasSettings
from synthia_vllm.supervise import spawn, supervise

_TICK_S = 0.2
_RETRY_AFTER_S = 2.0
_STALLED_S = 1.0  # a longer tick means that this process did not run
_FAILED_AGAIN_S = 0.5  # a replica that is not up is asked again so soon
_CANARY = {"max_tokens": 1, "temperature": 0}

_log = structlog.get_logger(__name__)


class ReplicaPool:
    """An engine that generates on the replicas it is told of, and goes on from another when one is lost.

    A replica takes requests from the moment that it has answered a canary, one generated token. From then on it is
    judged by what it does (`synthia_vllm.replicas.health`), and asked for another token when it has nothing to do. One
    that hangs is out, and what ran on it goes on elsewhere (`synthia_vllm.replicas.sequence`); one that refuses
    connections or answers a canary with an error gets no more requests, and those it has depend on their own
    connections. Replicas that are not listed any more drain: whatever their port says, what runs there finishes.

    An engine that is no vLLM is asked for nothing but what it is: tokens of others may cost money. It is well while it
    takes connections, and a reply of which nothing comes for `silence_s` seconds is lost.

    Requests wait in order of arrival while no replica is up, at most `start_wait_s`: 503 after that. Where that
    `wakes` one, the pool is ready all the same. `async with` opens the connections and watches the replicas.
    `on_capacity` is told when what all of them hold changes.
    """

    def __init__(
        self,
        settings: ReplicasSettings,
        *,
        tokenizer: Tokenizer | None = None,
        context: int | None = None,
        names: Sequence[str] = (),
        key: str | None = None,
        connect_timeout: float = 5.0,
        silence_s: float = 300.0,
        resume: bool = True,
        wakes: bool = False,
    ) -> None:
        self.settings = settings
        self.wakes = wakes  # whether a request that waits has a replica started where there is none
        self.silence_s = silence_s
        self.resume = resume  # False: what has lost its replica ends with an error, unless nothing of it had come yet
        self.tokenizer = tokenizer  # None: prompts go as text
        self.headers = own_headers(key)  # of every question to a replica; `key` is what they ask for
        self.on_capacity: Callable[[Capacity], None] | None = None
        self.session: aiohttp.ClientSession
        self.budget: RetryBudget
        self.tokens_per_replica: int | None = None  # KV cache of one, as the last one told
        self.root: str | None = None  # unknown until a replica tells it
        self.context = context  # None: unknown until a replica tells it
        self._context_is_set = context is not None
        self._connect_timeout = connect_timeout
        self._router = Router(settings.routing, settings.max_load_factor)
        self._replicas: dict[str, Replica] = {}
        self._waiters: deque[Waiter] = deque()
        self._told: Capacity | None = None
        # Names hold while no replica is up: who asks for one of them waits here.
        self._models = ModelList(self.headers, lambda: self.session, names=names, keep=True)

    async def __aenter__(self) -> "ReplicaPool":
        self._loop = asyncio.get_running_loop()
        self.session = open_session(self._connect_timeout)
        self.budget = RetryBudget(self._loop.time)
        self._watch = supervise("pool", self._run)
        return self

    async def __aexit__(self, *_: object) -> None:
        asked = [task for replica in self._replicas.values() for task in (replica.asking, replica.canary) if task]
        tasks = [self._watch, *asked]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._models.close()
        await self.session.close()

    def update(self, listed: Mapping[str, str]) -> None:
        """Tells which replicas there are: name to base URL, with vLLM's routes under it."""
        for name, url in listed.items():
            if name not in self._replicas:
                now = self._loop.time()
                health = Health(self.settings.canary_deadline_s, now)
                replica = self._replicas[name] = Replica(name, Endpoint(url.rstrip("/")), health, doubted_at=now)
                _log.info("replica_listed", replica=name, url=url)
                self._ask(replica)
            elif self._replicas[name].draining_since is not None:
                self._replicas[name].draining_since = None
                self._doubt(self._replicas[name])
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
        """Whether a request would be taken: by a replica, or by the queue for one where none is meant to run."""
        none_failed = not any(one.state in ("up", "out") for one in self._replicas.values())
        return bool(self.up()) or (self.wakes and none_failed)

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
        """A request on trial has gone beyond where it was when a replica died: others may be tried there."""
        replica.on_trial = False
        self._hand_out()

    def heard(self, replica: Replica) -> None:
        """A byte came: the replica works."""
        replica.health.heard(self._loop.time())

    def lost(self, replica: Replica, reason: LossReason) -> None:
        """A request lost this replica: whether others did is found out now."""
        if reason in ("died", "error") and replica.state == "up":
            self._doubt(replica)

    def has_changed(self, replica: Replica) -> None:
        """It has no such route or model: what is there now is something else."""
        replica.endpoint.kind = None
        if replica.state == "up":
            self._doubt(replica)

    def retry_delay(self) -> float:
        """Seconds before a request may be asked again."""
        return self.budget.delay(sum(replica.in_flight for replica in self._replicas.values()))

    # Who is well

    def _doubt(self, replica: Replica) -> None:
        """Gives it no more requests until it has shown that it works."""
        replica.state, replica.doubted_at = "unproven", self._loop.time()
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
        free = [replica for replica in free if replica not in avoid] or free
        # What waits inside an engine waits in order of arrival, and not fairly.
        with_room = [replica for replica in free if replica.in_flight < (replica.max_requests or math.inf)]
        return self._router.pick(with_room or free, affinity)

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
        now = self._loop.time()
        while True:
            await asyncio.sleep(_TICK_S)
            slept, now = self._loop.time() - now, self._loop.time()
            for replica in list(self._replicas.values()):
                if slept > _STALLED_S:
                    replica.health.forgive(slept)  # it may have told all the time, and nobody here listened
                self._look_after(replica, now)
            if self._waiters:
                self._hand_out()  # a new replica may take more than a moment ago

    def _look_after(self, replica: Replica, now: float) -> None:
        for attempt in list(replica.attempts):
            if now >= attempt.ends_at:
                attempt.take_away("overlong")
        if replica.draining_since is not None:
            if now - replica.draining_since >= self.settings.handover_s and self.up():
                replica.take_attempts_away("drained", only_movable=True)
            return
        up = replica.state == "up"
        if now - replica.asked_at >= (self.settings.canary_period_s if up else _FAILED_AGAIN_S):
            self._ask(replica)
        if replica.stands_still(now):
            self._out(replica, "hung")
        elif not up and replica.health.works_since(replica.doubted_at) and replica.is_known_or_queues(now):
            self._is_up(replica)
        if replica.hangs and self.up():
            replica.take_attempts_away("hung")

    def _ask(self, replica: Replica) -> None:
        """Asks for its counters, and for a token if it has nothing else to do or does not say."""
        now = self._loop.time()
        if replica.asking is None or replica.asking.done():
            replica.asked_at = now
            replica.asking = spawn("question", self._judged(replica, self._counters))

    async def _judged(self, replica: Replica, ask: Callable[[Replica], Awaitable[None]], seconds: float = 0.0) -> None:
        """Asks a question. What becomes of it says how the replica is."""
        try:
            async with asyncio.timeout(seconds or self.settings.canary_deadline_s):
                await ask(replica)
        except TimeoutError:  # aiohttp's too, of a connection that does not come about
            await asyncio.sleep(2 * _TICK_S)  # if it was this process that stood still, that is forgiven by now
            silent = self._loop.time() - replica.health.answered_at
            if replica.endpoint.vllm and silent >= replica.health.patience:
                self._out(replica, "hung")
        except aiohttp.ClientConnectorError:
            self._out(replica, "died")
        except aiohttp.ClientError:
            if replica.state == "up":
                self._doubt(replica)
        except EngineRefused as refused:
            if not refused.busy:
                self._out(replica, "error")
                self._tell_of_key(replica, refused)

    async def _counters(self, replica: Replica) -> None:
        endpoint, health = replica.endpoint, replica.health
        if endpoint.kind is None:
            await detect(endpoint, self.session, self.headers, tokens=self.tokenizer is not None)
            self.root = self.root or endpoint.root
            if not self._context_is_set:
                self.context = least_context(one.endpoint for one in self._replicas.values())
        held = replica.cache_tokens, replica.max_requests
        health.told(await ask_counters(endpoint.url, self.session, self.headers), self._loop.time())
        if replica.state == "up" and held != (replica.cache_tokens, replica.max_requests):
            self._tell_capacity()
        now = self._loop.time()
        if not endpoint.vllm:
            if replica.state in ("unproven", "out"):
                self._is_up(replica)
            return
        # Whoever tells what it does is asked when it does nothing, the others whenever nothing came from them.
        due = max(replica.canary_at, -math.inf if health.tells else health.worked_at) + self.settings.canary_period_s
        if replica.canary_waits or (replica.state == "up" and now < due):
            return
        idle = health.requests == 0 and (not health.tells or all(attempt.begun for attempt in replica.attempts))
        if idle or replica.up_since is None:  # others may keep it busy for ever
            replica.canary_at = now
            replica.canary = spawn("canary", self._judged(replica, self._canary, 2 * health.patience))

    async def _canary(self, replica: Replica) -> None:
        """Asks for one token."""
        endpoint = replica.endpoint
        body: dict[str, Any]
        if endpoint.kind == "generate":
            path, body = GENERATE, {"token_ids": [1], "sampling_params": _CANARY}
        else:
            path, body = COMPLETIONS, {"model": endpoint.model(""), "prompt": [1], **_CANARY}
        data, headers = msgspec.json.encode(body), {**self.headers, "Content-Type": "application/json"}
        async with self.session.post(endpoint.url + path, data=data, headers=headers) as reply:
            said = await reply.read()
        if reply.status in (404, 405):
            endpoint.kind = None  # what is there now is something else
        if reply.status != 200:
            raise refusal(reply.status, said)
        self.heard(replica)
        if replica.state in ("unproven", "out"):
            self._is_up(replica)

    def _is_up(self, replica: Replica) -> None:
        _log.info("replica_up", replica=replica.name, speaks=replica.endpoint.kind)
        replica.state, replica.hangs, replica.refuses_key = "up", False, False
        replica.up_since = replica.up_since or self._loop.time()
        self._tell_capacity()
        self._hand_out()

    def _out(self, replica: Replica, reason: LossReason) -> None:
        if replica.state == "draining":
            return
        if replica.state == "up" or (reason == "hung" and not replica.hangs):
            _log.warning("replica_out", replica=replica.name, reason=reason, in_flight=replica.in_flight)
        if replica.state != "out":
            replica.state, replica.doubted_at = "out", self._loop.time()
            replica.deaths += reason != "error"
            self._tell_capacity()
        if reason == "hung":
            # It may be slow and not dead: where nobody else is up, what it has it can only lose (`_look_after`).
            replica.hangs = True

    def _tell_of_key(self, replica: Replica, refused: EngineRefused) -> None:
        if refused.status in (401, 403) and not replica.refuses_key:
            replica.refuses_key = True
            _log.error(
                "replica_refuses_key",
                replica=replica.name,
                url=replica.endpoint.url,
                cure="gateways and engines need the same --access.secret (SYNTHIA_ACCESS__SECRET)",
            )

    def _forget_if_idle(self, replica: Replica) -> None:
        if replica.draining_since is not None and not replica.in_flight:
            for task in (replica.asking, replica.canary):
                if task is not None:
                    task.cancel()
            self._replicas.pop(replica.name, None)

    def _tell_capacity(self) -> None:
        """Unknown, and then unbounded, while no replica is up: who comes then waits here, not in the fair queue."""
        up = self.up()
        held = [replica.cache_tokens for replica in up]
        known = [tokens for tokens in held if tokens is not None]
        if known:
            self.tokens_per_replica = known[-1]
        most = self.settings.max_requests_per_replica
        capacity = Capacity(
            tokens=sum(known) if known and len(known) == len(held) else None,
            requests=sum(min(most, replica.max_requests or most) for replica in up) or None,
        )
        if capacity != self._told:
            self._told = capacity
            if self.on_capacity is not None:
                self.on_capacity(capacity)
