"""The stack: what every request passes on its way to an engine, and what is kept running beside it."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp

from synthia_vllm.engine.port import Capacity, Engine
from synthia_vllm.errors import Overloaded, SetupError
from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import Account, UserLimits
from synthia_vllm.gateway.admin import build_admin
from synthia_vllm.gateway.apis import ANSWERING, GENERATING, MODELS, Apis
from synthia_vllm.gateway.edge.routes import ADMIN_PREFIX, Routes
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.limits.base import Limiter
from synthia_vllm.gateway.limits.layer import Limits, merge
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.observers.log import RequestLog
from synthia_vllm.gateway.observers.metrics import Metrics
from synthia_vllm.gateway.observers.tracing import check_tracing, open_tracing
from synthia_vllm.gateway.readiness import Readiness
from synthia_vllm.gateway.request import Layer, Observer
from synthia_vllm.gateway.sequences import Sequences
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.key_cache import KeyCache
from synthia_vllm.gateway.store.keys import KeyStore, load_secret
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.usage import spent_tokens
from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Table, single
from synthia_vllm.metrics.exporter import Exporter, MetricsRoutes
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.limits import SHARED_UP
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.replicas import ReplicaSource
from synthia_vllm.settings import LOOPBACK, Settings
from synthia_vllm.web.page import StatusPage

# What there is, and how it is asked; all else is 404. What ends in `/` stands for all below it.
METHODS: Mapping[str, tuple[str, ...]] = {
    **{api.path: ("POST",) for api in GENERATING},
    **{api.path: ("POST",) for api in ANSWERING},
    **dict.fromkeys((MODELS, f"{MODELS}/", "/health", "/ready", "/metrics", "/sd"), ("GET",)),
    ADMIN_PREFIX: ("GET", "POST", "DELETE"),
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
        return settings.host not in LOOPBACK and not settings.insecure
    return settings.access.mode == "keys"


def check_stores(settings: Settings) -> str:
    """Tries what the gateway will need, before a model is loaded; returns where the database is.

    Raises SetupError that names the option.
    """
    check_tracing(settings.tracing)
    database = open_database(settings.access.database)
    load_secret(settings)
    database.dispose()
    asyncio.run(_limiter(settings, None).close())
    return database.url.render_as_string(hide_password=True)


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
    ) -> None:
        database = open_database(settings.access.database)
        self.engine = engine
        self.keys = KeyStore(database, load_secret(settings))
        self.key_cache = KeyCache(self.keys)
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
        )
        if capacity is not None:
            self.set_capacity(capacity)
        self._database = database
        recorder = Recorder(settings.metrics, settings.slo)
        self.exporter = Exporter(
            recorder,
            lambda: Waiting(self.scheduler.running, self.scheduler.waiting()),
            fleet=Fleet(replicas, headers=replica_headers) if replicas is not None else None,
            wait=settings.metrics.replica_wait_s,
            more=self._ledger_tables,
        )
        metrics = Metrics(recorder, prompt_cost=fair.prompt_cost, generated_cost=fair.generated_cost)
        self._tracing = open_tracing(settings.tracing)
        observers: list[Observer] = [self.ledger, metrics, RequestLog(settings.log)]
        if self._tracing is not None:
            observers.insert(0, self._tracing)
        self.apis = Apis(
            engine,
            self._layers(engine),
            settings.prompt,
            observers=(metrics,),  # the others have no use for each chunk
            **({"on_attempt": self._tracing.attempt} if self._tracing is not None else {}),
        )
        self.access = Access(
            self.apis,
            lookup=self.key_cache.lookup,
            keys_required=keys_required(settings),
            observers=observers,
            ready=Readiness(engine, last_token=self._last_token),
            metrics=MetricsRoutes(self.exporter),
            admin=build_admin(self),
            max_body_bytes=settings.max_body_bytes,
            body_timeout=settings.timeouts.body,
        )
        self.app: ASGIApp = Routes(
            self.access,
            methods=METHODS,
            page=StatusPage(keys_required(settings)) if settings.page else None,
            cors_origins=settings.cors_origins,
        )

    async def __aenter__(self) -> "Gateway":
        self._tasks = [asyncio.create_task(self.key_cache.watch()), asyncio.create_task(self.ledger.run())]
        await self.exporter.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.exporter.__aexit__()
        if self._tracing is not None:
            await self._tracing.close()
        await self.limiter.close()
        await asyncio.to_thread(self.ledger.close)
        self.key_cache.close()
        self._database.dispose()

    def set_capacity(self, capacity: Capacity) -> None:
        """What the engines hold now, where they come and go; a setting wins."""
        fair = self.settings.fair
        self.scheduler.room.capacity = replace(
            capacity,
            tokens=fair.max_in_flight_tokens or capacity.tokens,
            requests=fair.max_in_flight_requests or capacity.requests,
        )
        self.scheduler.dispatch()

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

    def _layers(self, engine: Engine) -> Layer:
        fair = self.settings.fair
        queue = FairQueue(
            Sequences(Meter(engine)),
            scheduler=self.scheduler,
            max_wait=fair.max_wait_s,
            max_requests=fair.max_queued_requests,
            max_tokens=fair.max_queued_tokens,
        )
        return Limits(queue, limiter=self.limiter, defaults=self.default_limits)

    def _spent(self, user: str, since: float) -> int:
        """What the ledger has of a user since then. Raises Overloaded (503) where it can't be asked."""
        try:
            return spent_tokens(self._database, user, since)
        except SQLAlchemyError:
            raise Overloaded("what this month has used can't be looked up now", 5.0) from None

    def _last_token(self) -> float:
        return max((one.usage.last_token or 0.0 for one in self.access.open.values()), default=0.0)

    def _ledger_tables(self) -> list[Table]:
        ledger = self.ledger
        numbers = (
            (series.LEDGER_UP, int(not ledger.failing)),
            (series.LEDGER_WAITING, ledger.waiting),
            (series.LEDGER_LOST, ledger.lost),
        )
        return [single(family, value) for family, value in numbers]


def _limiter(settings: Settings, spent: Any) -> Limiter:
    SHARED_UP.set(1)
    url = settings.limits.redis
    if url is None:
        return MemoryLimiter(spent=spent)
    try:
        return SharedLimiter(url, on_loss=settings.limits.on_redis_loss, spent=spent)
    except ValueError as error:
        raise SetupError(f"--limits.redis {url}: {error}") from None
