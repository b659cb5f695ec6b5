"""The stack: what every request passes on its way to an engine, and what is kept running beside it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from synthia_vllm import __version__
from synthia_vllm.api import abort, openapi
from synthia_vllm.engine.continued import Continued
from synthia_vllm.engine.port import Capacity, Engine
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway import own_usage
from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import Account, UserLimits
from synthia_vllm.gateway.admin import build_admin
from synthia_vllm.gateway.apis import ANSWERING, GENERATING, MODELS, Apis
from synthia_vllm.gateway.cache_sharing import CacheSharing
from synthia_vllm.gateway.edge.hosts import Hosts
from synthia_vllm.gateway.edge.routes import ADMIN_PREFIX, Routes
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.peers import identity, share
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.fair.shared import SharedQueue
from synthia_vllm.gateway.journal.layer import Journaling
from synthia_vllm.gateway.journal.store import Journals
from synthia_vllm.gateway.limits.base import Limiter
from synthia_vllm.gateway.limits.layer import Limits, merge
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.observers.log import RequestLog
from synthia_vllm.gateway.observers.metrics import Metrics
from synthia_vllm.gateway.observers.tracing import check_tracing, open_tracing
from synthia_vllm.gateway.readiness import Readiness
from synthia_vllm.gateway.request import Layer, Observer, Usage
from synthia_vllm.gateway.sequences import Sequences
from synthia_vllm.gateway.store.database import open_database, shown
from synthia_vllm.gateway.store.key_cache import KeyCache
from synthia_vllm.gateway.store.keys import KeyStore, load_secret
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.ready import StoresReady
from synthia_vllm.gateway.store.usage import spent_tokens
from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Table, single
from synthia_vllm.metrics.exporter import Exporter, MetricsRoutes, Share
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.limits import SHARED_UP
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.replicas import ReplicaSource
from synthia_vllm.metrics.shared import SharedMetrics
from synthia_vllm.secret_urls import REDIS_FORM, reveal
from synthia_vllm.settings import Settings
from synthia_vllm.supervise import stop, supervise
from synthia_vllm.web.page import StatusPage

# What there is, and how it is asked; all else is 404. What ends in `/` stands for all below it.
METHODS: Mapping[str, tuple[str, ...]] = {
    **{api.path: ("POST",) for api in GENERATING},
    **{api.path: ("POST",) for api in ANSWERING},
    abort.PATH: ("POST",),
    **dict.fromkeys((MODELS, f"{MODELS}/", "/health", "/ready", "/metrics", "/sd"), ("GET",)),
    **dict.fromkeys((own_usage.PATH, f"{own_usage.PATH}/"), ("GET",)),
    ADMIN_PREFIX: ("GET", "POST", "PATCH", "DELETE"),
}


async def nobody(key: str) -> Account | None:
    """The look-up where keys are neither needed nor known."""
    return None


def without_users(engine: Engine, settings: Settings) -> ASGIApp:
    """The APIs without users, limits and bill: for one who runs the engine for himself."""
    apis = Apis(engine, Sequences(Meter(engine)), settings.prompt)
    access = Access(apis, lookup=nobody, keys_required=False, max_body_bytes=settings.max_body_bytes)
    return Routes(access, methods=METHODS)


def keys_required(settings: Settings) -> bool:
    """Whether requests need a key: as set, and where nothing is set, whenever others can reach the address."""
    if settings.access.mode == "auto":
        return not settings.this_machine_only and not settings.insecure
    return settings.access.mode == "keys"


def named(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Answers only under the names that this server goes by, where names are set or no key is needed."""
    foreign = settings.this_machine_only and not keys_required(settings)  # pages could ask, of any website
    if not foreign and not settings.access.hosts:
        return app
    return Hosts(app, settings.access.hosts, origins=settings.cors_origins if foreign else None)


def _pages(settings: Settings, usage_app: FastAPI) -> dict[str, ASGIApp]:
    """What is read without a key."""
    needed = keys_required(settings)
    pages: dict[str, ASGIApp] = {}
    if settings.page:
        pages["/"] = StatusPage(needed)
    if settings.openapi:
        told = openapi.document(__version__, GENERATING, ANSWERING, usage_app.openapi(), keys_required=needed)
        pages[openapi.PATH] = JSONResponse(told)
    return pages


def check_stores(settings: Settings) -> str:
    """Tries what the gateway will need, before a model is loaded; returns where the database is.

    Raises SetupError that names the option.
    """
    check_tracing(settings.tracing)
    database = open_database(reveal(settings.access.database))
    load_secret(settings)
    database.dispose()
    asyncio.run(_limiter(settings, None).close())
    return shown(database.url)


class Gateway:
    """Our layers over an engine, behind HTTP.

    `async with` keeps its companions running: the watch on revoked keys, the ledger's writer, the shared limits. The
    ledger's last rows are written at the end. Raises SetupError where the database can't be opened.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        capacity: Capacity | None = None,
        replicas: ReplicaSource | None = None,
        replica_headers: Mapping[str, str] | None = None,
        engines: Sequence[str] = (),
    ) -> None:
        """`engines`: their URLs, where other gateways may be before them, with which what is counted is shared."""
        database = open_database(reveal(settings.access.database))
        self.engine = engine
        secret = load_secret(settings)
        self.keys = KeyStore(database, secret)
        self.key_cache = KeyCache(self.keys, answer_s=settings.timeouts.database)
        self.ledger = Ledger(database)
        self.limiter = _limiter(settings, self._spent)
        self.default_limits = UserLimits.of(settings.limits)
        self.settings = settings
        fair = settings.fair
        self.scheduler = Scheduler(
            Capacity(fair.max_in_flight_tokens, fair.max_in_flight_requests),
            policy=fair.policy,
            prompt_cost=fair.prompt_cost,
            generated_cost=fair.generated_cost,
            ageing=fair.batch_ageing_s,
            batch_share=fair.batch_share,
        )
        self._gateways = 1
        self.set_capacity(capacity or Capacity())
        self._database = database
        recorder = Recorder(settings.metrics, settings.slo)
        self.exporter = Exporter(
            recorder,
            lambda: Waiting(self.scheduler.running, self.scheduler.waiting()),
            fleet=Fleet(replicas, headers=replica_headers) if replicas is not None else None,
            wait=settings.metrics.replica_wait_s,
            more=self._ledger_tables,
            model=lambda: engine.root,
            share=_share(settings, engines),
        )
        metrics = Metrics(recorder, prompt_cost=fair.prompt_cost, generated_cost=fair.generated_cost)
        self._tracing = open_tracing(settings.tracing)
        ready = Readiness(engine, usages=self._usages, max_wait=fair.max_wait_s)
        observers: list[Observer] = [self.ledger, metrics, RequestLog(settings.log), ready]
        if self._tracing is not None:
            observers.insert(0, self._tracing)
        self.journals = _journals(settings)
        layers = self._layers(engine)
        self.apis = Apis(
            engine,
            layers,
            settings.prompt,
            observers=(metrics,),  # the others have no use for each chunk
            arrivals=layers.arrivals,
            salt=CacheSharing(settings.prompt.cache_sharing, secret).salt,
            keep_bodies=settings.log.texts,
            journals=self.journals,
            release=self.limiter.release,
            **({"on_attempt": self._tracing.attempt} if self._tracing is not None else {}),
        )
        usage_app = own_usage.build_own_usage(database)
        self.access = Access(
            self.apis,
            lookup=self.key_cache.lookup,
            keys_required=keys_required(settings),
            observers=observers,
            ready=StoresReady(
                ready,
                keys=self.key_cache if keys_required(settings) else None,
                ledger=self.ledger,
            ),
            metrics=MetricsRoutes(self.exporter),
            admin=build_admin(self),
            usage=usage_app,
            max_body_bytes=settings.max_body_bytes,
            body_timeout=settings.timeouts.body,
        )
        app = Routes(
            self.access,
            methods=METHODS,
            pages=_pages(settings, usage_app),
            cors_origins=settings.cors_origins,
        )
        self.app: ASGIApp = named(app, settings)

    async def __aenter__(self) -> "Gateway":
        self._tasks = [supervise("key_watch", self.key_cache.watch), supervise("ledger", self.ledger.run)]
        if self.journals is not None:
            self._tasks.append(supervise("journal", self.journals.run))
        await self.exporter.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            await stop(task)
        await asyncio.to_thread(self.ledger.close)  # before what may hang, or fail
        if self.journals is not None:
            await self.journals.aclose()
        await self.exporter.__aexit__()
        if self._tracing is not None:
            await self._tracing.close()
        await self.limiter.close()
        self.key_cache.close()
        self._database.dispose()

    def set_capacity(self, capacity: Capacity) -> None:
        """What the engines hold now, where they come and go; a setting wins."""
        fair = self.settings.fair
        self._held = capacity
        whole = replace(
            capacity,
            tokens=fair.max_in_flight_tokens or capacity.tokens,
            requests=fair.max_in_flight_requests or capacity.requests,
        )
        self.scheduler.room.capacity = share(whole, self._gateways)
        self.scheduler.dispatch()

    def set_gateways(self, number: int) -> None:
        """How many gateways divide what the engines hold, this one among them; 1 where they share it through Redis."""
        self._gateways = number
        self.set_capacity(self._held)

    @contextlib.asynccontextmanager
    async def sharing(self, engines: Sequence[str]) -> AsyncIterator[None]:
        """Shares the queue with the other gateways before engines of these names, through the Redis of the limits."""
        settings = self.settings
        assert settings.limits.redis is not None
        queue = SharedQueue(
            settings.limits.redis.get_secret_value(),
            engines,
            self.scheduler,
            self.set_gateways,
            least=self._gateways,
            timeout=settings.timeouts.redis,
        )
        await queue.settle()
        settling = supervise("shared_queue", queue.run)
        try:
            yield
        finally:
            await stop(settling)
            await queue.close()

    async def state(self) -> dict[str, Any]:
        """The live view: users in flight and queued, service, limits used and left; tokens, requests, seconds."""
        found = self.scheduler.snapshot()
        users = found["users"]
        limits = {one.account.user: merge(one.account.limits, self.default_limits) for one in self.access.open.values()}
        for user in users:
            users[user]["used"] = asdict(await self.limiter.standing(user))
            if user in limits:
                users[user]["limits"] = asdict(limits[user])
        return found

    def _layers(self, engine: Engine) -> Limits:
        fair = self.settings.fair
        sequences: Layer = Sequences(Meter(engine if self.journals is None else Continued(engine)))
        queue = FairQueue(
            Journaling(sequences, self.journals) if self.journals is not None else sequences,
            scheduler=self.scheduler,
            max_wait=fair.max_wait_s,
            max_requests=fair.max_queued_requests,
            max_tokens=fair.max_queued_tokens,
        )
        return Limits(queue, limiter=self.limiter, defaults=self.default_limits)

    def _spent(self, user: str, since: float) -> int:
        """What the ledger has of a user since then."""
        return spent_tokens(self._database, user, since)

    def _usages(self) -> list[Usage]:
        return [one.usage for one in self.access.open.values()]

    def _ledger_tables(self) -> list[Table]:
        ledger = self.ledger
        numbers = (
            (series.LEDGER_UP, int(not ledger.failing)),
            (series.LEDGER_WAITING, ledger.waiting),
            (series.LEDGER_LOST, ledger.lost),
        )
        return [single(family, value) for family, value in numbers]


def _journals(settings: Settings) -> Journals | None:
    limits, timeouts = settings.limits, settings.timeouts
    if limits.redis is None or not timeouts.reply_kept:
        return None
    return Journals(limits.redis.get_secret_value(), keep_s=timeouts.reply_kept, timeout=timeouts.redis)


def _share(settings: Settings, engines: Sequence[str]) -> Share | None:
    if settings.limits.redis is None or not engines:
        return None
    url, ids = settings.limits.redis.get_secret_value(), [identity(engine) for engine in engines]
    return lambda own, names: SharedMetrics(url, ids, own, names, timeout=settings.timeouts.redis)


def _limiter(settings: Settings, spent: Any) -> Limiter:
    SHARED_UP.set(1)
    limits, answer_s = settings.limits, settings.timeouts.database
    if limits.redis is None:
        return MemoryLimiter(spent=spent, on_loss=limits.on_loss, answer_s=answer_s)
    try:
        return SharedLimiter(
            limits.redis.get_secret_value(),
            on_loss=limits.on_loss,
            spent=spent,
            answer_s=answer_s,
            timeout=settings.timeouts.redis,
        )
    except ValueError:  # its text may hold a part of the password
        raise SetupError(f"--limits.redis: {REDIS_FORM}") from None
