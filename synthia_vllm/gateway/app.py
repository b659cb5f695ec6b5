"""The stack: what every request passes on its way to an engine, and what is kept running beside it."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.admin import build_admin
from synthia_vllm.gateway.call import Call
from synthia_vllm.gateway.contract import Contract
from synthia_vllm.gateway.delivery import Metering
from synthia_vllm.gateway.demand import Demand, TokenCounter, estimate_tokens
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.limits.base import Limiter
from synthia_vllm.gateway.limits.layer import Limits, merge
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.readiness import Readiness
from synthia_vllm.gateway.request_log import RequestLog
from synthia_vllm.gateway.routes import Routes
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.key_cache import KeyCache
from synthia_vllm.gateway.store.keys import KeyStore, load_secret
from synthia_vllm.gateway.store.ledger import Ledger
from synthia_vllm.gateway.store.usage import spent_tokens
from synthia_vllm.gateway.tracing import check_tracing, open_tracing
from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Table, single
from synthia_vllm.metrics.exporter import Exporter, MetricsRoutes
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.limits import SHARED_UP
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.replicas import ReplicaSource
from synthia_vllm.settings import LOOPBACK, Settings
from synthia_vllm.web.page import StatusPage


def contract_only(upstream: ASGIApp, settings: Settings) -> ASGIApp:
    """The prompt contract without users: for one who runs the engine for himself."""
    return Contract(upstream, role_markers=settings.prompt.role_markers, max_body_bytes=settings.max_body_bytes)


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
    asyncio.run(_close(settings))
    return database.url.render_as_string(hide_password=True)


class Gateway:
    """Our layers around an upstream, itself an ASGI app (vLLM's own, or a proxy to engines).

    `async with` keeps its companions running: the watch on revoked keys, the ledger's writer, the shared limits. The
    ledger's last rows are written at the end. Raises SetupError where the database can't be opened.
    """

    def __init__(
        self,
        upstream: ASGIApp,
        settings: Settings,
        *,
        capacity: Capacity | None = None,
        count: TokenCounter = estimate_tokens,
        context: int | None = None,
        replicas: ReplicaSource | None = None,
        replica_headers: Mapping[str, str] | None = None,
    ) -> None:
        database = open_database(settings.access.database)
        self.keys = KeyStore(database, load_secret(settings))
        self.key_cache = KeyCache(self.keys)
        self.ledger = Ledger(database)
        self.limiter = _limiter(settings, lambda user, since: spent_tokens(database, user, since))
        self.default_limits = UserLimits(
            requests_per_minute=settings.limits.requests_per_minute,
            tokens_per_minute=settings.limits.tokens_per_minute,
            concurrent_requests=settings.limits.concurrent_requests,
            tokens_per_month=settings.limits.tokens_per_month,
        )
        self.settings = settings
        fair = settings.fair
        self.scheduler = Scheduler(
            capacity or Capacity(fair.max_in_flight_tokens, fair.max_in_flight_requests),
            policy=fair.policy,
            prompt_cost=fair.prompt_cost,
            generated_cost=fair.generated_cost,
            ageing=fair.batch_ageing_s,
        )
        self._database = database
        self._log = RequestLog(settings.log)
        if not getattr(upstream, "tells_readiness", False):
            upstream = Readiness(upstream, last_token=self._last_token)
        recorder = Recorder(settings.metrics, settings.slo)
        self._metering = Metering(recorder, prompt_cost=fair.prompt_cost, generated_cost=fair.generated_cost)
        self.exporter = Exporter(
            recorder,
            lambda: Waiting(self.scheduler.running, self.scheduler.waiting()),
            fleet=Fleet(replicas, headers=replica_headers) if replicas is not None else None,
            wait=settings.metrics.replica_wait_s,
            more=self._ledger_tables,
        )
        self._tracing = open_tracing(settings.tracing)
        app: ASGIApp = Meter(upstream)
        app = FairQueue(
            app,
            scheduler=self.scheduler,
            max_wait=fair.max_wait_s,
            max_requests=fair.max_queued_requests,
            max_tokens=fair.max_queued_tokens,
        )
        app = Limits(app, limiter=self.limiter, defaults=self.default_limits)
        app = Contract(app, role_markers=settings.prompt.role_markers)
        app = MetricsRoutes(app, self.exporter)
        self.access = Access(
            app,
            lookup=self.key_cache.lookup,
            keys_required=keys_required(settings),
            on_end=self._ended,
            demand=Demand(count, context),
            metering=self._metering,
            tracing=self._tracing,
            admin=build_admin(self),
            max_body_bytes=settings.max_body_bytes,
            body_timeout=settings.timeouts.body,
        )
        self.app: ASGIApp = Routes(self.access, page=StatusPage(keys_required(settings)) if settings.page else None)

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
        limits = {
            call.account.user: merge(call.account.limits, self.default_limits) for call in self.access.open.values()
        }
        for user in users:
            standing = await self.limiter.standing(user)
            users[user]["used"] = {name: getattr(standing, name) for name in standing.__slots__}
            if user in limits:
                users[user]["limits"] = {name: getattr(limits[user], name) for name in limits[user].__slots__}
        return found

    def _last_token(self) -> float:
        return max((call.last_token or 0.0 for call in self.access.open.values()), default=0.0)

    def _ledger_tables(self) -> list[Table]:
        ledger = self.ledger
        numbers = (
            (series.LEDGER_UP, int(not ledger.failing)),
            (series.LEDGER_WAITING, ledger.waiting),
            (series.LEDGER_LOST, ledger.lost),
        )
        return [single(family, value) for family, value in numbers]

    def _ended(self, call: Call) -> None:
        if call.max_generated:
            self.ledger.add(call)
        self._metering.close(call)
        if call.trace is not None:
            call.trace.end()
        self._log.write(call)


async def _close(settings: Settings) -> None:
    await _limiter(settings, None).close()


def _limiter(settings: Settings, spent: Any) -> Limiter:
    SHARED_UP.set(1)
    url = settings.limits.redis
    if url is None:
        return MemoryLimiter(spent=spent)
    try:
        return SharedLimiter(url, on_loss=settings.limits.on_redis_loss, spent=spent)
    except ValueError as error:
        raise SetupError(f"--limits.redis {url}: {error}") from None
