"""One sequence from its first replica to its last."""

import asyncio
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import aclosing
from typing import Protocol

import aiohttp
import structlog

from synthia_vllm.engine.port import Affinity, Delta, Generation
from synthia_vllm.engine.resume import resume, stateful
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.engine.transcript import Transcript
from synthia_vllm.errors import UpstreamLost, UpstreamTimeout
from synthia_vllm.metrics.replicas import STREAM_RESUMES
from synthia_vllm.replicas.attempt import Attempt, AttemptLost, LossReason
from synthia_vllm.replicas.completions import UNKNOWN
from synthia_vllm.replicas.http import EngineRefused, request_headers
from synthia_vllm.replicas.kinds import reply_of
from synthia_vllm.replicas.replica import Replica, Waiter
from synthia_vllm.replicas.reply import Reply
from synthia_vllm.settings import ReplicasSettings

_PATIENCE_S = 2.0  # between two notes to a client that waits for a replica
_ACQUITTED_AFTER = 8  # tokens: what kills an engine does so where it did so before
_SETTLE_S = 0.5
_MAX_ERRORS = 1  # a bug that one engine has the others have as well

_log = structlog.get_logger(__name__)


class Replicas(Protocol):
    """What a sequence needs of the pool."""

    settings: ReplicasSettings
    silence_s: float
    resume: bool
    tokenizer: Tokenizer | None
    headers: dict[str, str]
    session: aiohttp.ClientSession

    def up(self) -> Set[Replica]: ...

    def queue(self, affinity: Affinity | None, avoid: Set[Replica], *, on_trial: bool) -> Waiter: ...

    def leave(self, waiter: Waiter) -> None: ...

    def waited(self, waiter: Waiter) -> float: ...

    def release(self, replica: Replica, on_trial: bool = False) -> None: ...

    def acquit(self, replica: Replica) -> None: ...

    def heard(self, replica: Replica) -> None: ...

    def lost(self, replica: Replica, reason: LossReason) -> None: ...

    def has_changed(self, replica: Replica) -> None: ...

    def retry_delay(self) -> float: ...


class PooledSequence:
    """Asks replica after replica until a sequence is whole.

    Raises UpstreamLost where that can't be: it was there when too many replicas died, or what it had can't be taken up
    by another. Its text is made above the attempts, so that no seam shows.
    """

    def __init__(self, pool: Replicas, generation: Generation) -> None:
        self._pool = pool
        self._generation = generation
        self._transcript = Transcript(generation, pool.tokenizer)
        self._stateful = stateful(generation.sampling)
        self._ids: list[int] = []  # so far
        self._prompt_ids: Sequence[int] = generation.prompt  # or as a replica told them
        self._replica = ""
        self._attempts = 0
        self._last_loss: LossReason | None = None
        self._resumed = False  # had a token when it lost a replica
        # The replicas that were lost under this request, whatever it had of them; how often each had died before, and
        # when it was lost. Who saw one die goes on at once; who saw two is tried where no other such is, so that the
        # next death has one cause.
        self._losses: list[tuple[Replica, int, float]] = []
        self._on_trial = False
        self._ends_at: float | None = None  # loop time
        self._count_before = 0  # of this attempt
        self._deaths_before = 0  # of its replica
        self._refused_by: set[Replica] = set()  # answered with a 5xx of their own
        self._errors = 0  # of those, that were not just busy

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        pool, ids = self._pool, self._ids
        while len(ids) < self._generation.sampling.max_tokens:
            waiter = await self._queue()
            try:
                while not waiter.given.done():
                    await asyncio.wait((waiter.given,), timeout=_PATIENCE_S)
                    if not waiter.given.done():
                        yield Delta(note=f"waiting for a replica, {pool.waited(waiter):.0f} s so far")
            except BaseException:
                pool.leave(waiter)
                raise
            replica = waiter.given.result()
            attempt, reply = self._begin(replica)
            try:
                async with aclosing(reply.read(attempt)) as deltas:
                    async for delta in deltas:
                        delta.replica = replica.name
                        ids += delta.ids
                        if self._on_trial and len(ids) - self._count_before >= _ACQUITTED_AFTER:
                            self._on_trial = False
                            pool.acquit(replica)
                        yield delta
            except EngineRefused as refused:
                if refused.status in (404, 405):
                    pool.has_changed(replica)
                self._lose(replica, reply, self._as_loss(replica, refused))
            except AttemptLost as loss:
                self._lose(replica, reply, loss)
            else:
                self._ended()
                return
            finally:
                replica.attempts.discard(attempt)
                pool.release(replica, self._on_trial)
        yield Delta(finish="length", replica=self._replica)  # all was there but the engine's own end
        self._ended()

    async def _queue(self) -> Waiter:
        self._on_trial = self._deaths() > 1
        if self._attempts:
            # Replicas of one node die one after the other; a trial among them would find the wrong one guilty.
            await asyncio.sleep(max(self._pool.retry_delay(), _SETTLE_S if self._on_trial else 0))
        return self._pool.queue(self._generation.affinity, self._refused_by, on_trial=self._on_trial)

    def _begin(self, replica: Replica) -> tuple[Attempt, Reply]:
        """What to ask a replica, and how its reply is read."""
        pool, generation, endpoint = self._pool, self._generation, replica.endpoint
        self._attempts += 1
        self._count_before = len(self._ids)
        self._deaths_before = replica.deaths
        self._replica = replica.name
        if self._ends_at is None:
            self._ends_at = asyncio.get_running_loop().time() + pool.settings.max_generation_s
        trace = generation.on_attempt(replica.name)
        attempt = Attempt(
            pool.session,
            endpoint,
            request_headers(pool.headers, generation.id, self._attempts, trace),
            heard=lambda: pool.heard(replica),
            # What would be said again from its beginning rather ends where it is.
            movable=pool.resume
            and endpoint.tells_ids
            and not self._stateful
            and generation.sampling.prompt_logprobs is None,
            silence_s=None if endpoint.vllm else pool.silence_s,
            prompt_tokens=(len(generation.prompt) or len(generation.text or "")) + len(self._ids),
            ends_at=self._ends_at,
        )
        if self._ids:
            generation = resume(generation, self._prompt_ids, self._ids, whole=self._transcript.whole)
        reply = reply_of(endpoint, generation, self._transcript, tuple(self._ids) if self._stateful else ())
        replica.attempts.add(attempt)
        return attempt, reply

    def _as_loss(self, replica: Replica, refused: EngineRefused) -> AttemptLost:
        """A replica's own error as its loss, where another may do better. Raises it as it is where not.

        An engine that died says 500, and so does a bug that every engine has.
        """
        others = self._pool.up() - self._refused_by - {replica}
        may_ask = refused.busy or self._errors < _MAX_ERRORS
        if refused.of_request or not (others and may_ask):
            raise UpstreamLost(f"the next replica answered {refused}") if self._ids else refused.as_error()
        self._refused_by.add(replica)
        self._errors += not refused.busy
        return AttemptLost("error", str(refused), reached=not refused.busy)

    def _lose(self, replica: Replica, reply: Reply, loss: AttemptLost) -> None:
        """Returns if the sequence may go on elsewhere; raises if not."""
        limits = self._pool.settings
        if loss.reason == "overlong":
            raise UpstreamTimeout(
                f"the reply took longer than any may: {limits.max_generation_s:g} s (--replicas.max-generation-s)"
            )
        self._pool.lost(replica, loss.reason)
        self._last_loss = loss.reason
        self._resumed = self._resumed or bool(self._ids)
        self._prompt_ids = self._prompt_ids or reply.prompt_ids or ()
        if loss.refused:
            self._attempts -= 1
        if loss.reached and loss.reason != "drained":
            self._losses.append((replica, self._deaths_before, asyncio.get_running_loop().time()))
        request = self._generation.id
        _log.warning(
            "replica_lost_under_request", replica=replica.name, request=request, reason=str(loss), tokens=len(self._ids)
        )
        if (deaths := self._deaths()) >= limits.max_losses:
            _log.error("request_refused_after_losses", request=request)
            raise self._given_up(
                f"{deaths} replicas were lost while they worked on this request; it is not tried again", "refused"
            )
        if self._attempts > limits.max_resumes:
            raise self._given_up(f"its replica was lost {self._attempts} times", "refused")
        if self._ids and not self._pool.resume:
            raise self._given_up(f"the engine broke off a reply: {loss.detail or loss.reason}", "broken")
        if self._ids and not self._may_go_on():
            raise self._given_up("its replica was lost, and this kind of reply can't go on elsewhere", "broken")

    def _deaths(self) -> int:
        """Of the replicas that were lost, those that have died. The others have answered since: a connection broke."""
        return sum(
            replica.deaths > before or replica.health.answered_at <= lost_at
            for replica, before, lost_at in self._losses
        )

    def _may_go_on(self) -> bool:
        """Whether the ids so far say where it stands."""
        if self._ids[-1] == UNKNOWN or not self._prompt_ids:
            return False
        return self._pool.tokenizer is not None or not self._stateful

    def _given_up(self, message: str, result: str) -> UpstreamLost:
        STREAM_RESUMES.labels(self._last_loss or "", result).inc()
        return (UpstreamTimeout if self._last_loss == "hung" else UpstreamLost)(message)

    def _ended(self) -> None:
        if self._last_loss is not None:
            STREAM_RESUMES.labels(self._last_loss, "resumed" if self._resumed else "retried").inc()
