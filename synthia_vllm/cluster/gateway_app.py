"""The gateway as a Serve application: the same layers as on one machine, above the pool of replicas."""

import asyncio
import contextlib
import os

import ray
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.cluster.config import ENGINE, ENGINE_ROUTE, GATEWAY_DEPLOYMENT
from synthia_vllm.cluster.discovery import ServeDiscovery
from synthia_vllm.cluster.guard import engine_key
from synthia_vllm.cluster.load import Load, tell
from synthia_vllm.engine.arguments import find_model
from synthia_vllm.engine.memory import read_geometry
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.fair.peers import identity
from synthia_vllm.gateway.observers.log import configure_logging
from synthia_vllm.replicas.pool import ReplicaPool
from synthia_vllm.settings import Settings, dump
from synthia_vllm.supervise import supervise

# Our own queue bounds what comes in. This only has to be more, else requests would wait in Serve's, which is not fair.
_UNBOUNDED = 1_000_000


def build_gateway(settings: Settings) -> serve.Application:
    deployment = serve.deployment(
        serve.ingress()(GatewayReplica),
        name=GATEWAY_DEPLOYMENT,
        num_replicas=settings.cluster.gateways,
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={
            "num_cpus": 0,
            "label_selector": settings.cluster.gateway_nodes,
            # Serve's loop and ours are one: else each chunk of a stream changes threads on its way.
            "runtime_env": {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}},
        },
    )
    return deployment.bind(dump(settings))


class GatewayReplica:
    """One gateway. Serve asks it for its ASGI app, and runs the lifespan around it."""

    def __init__(self, settings: dict[str, object]) -> None:
        self._settings = Settings(**settings)  # type: ignore[arg-type]

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        configure_logging(self._settings.log)
        return ClusterGateway(self._settings)


class ClusterGateway:
    """Gateway, pool and discovery as one ASGI app that starts and ends them with its lifespan."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ending = contextlib.AsyncExitStack()
        self._app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)

        async def send_once(message: Message) -> None:
            # Serve's server puts the request's id into the reply, and so do we: the same id, but two headers.
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        return await self._app(scope, receive, send_once)

    async def start(self) -> None:
        settings = self._settings
        timeouts = settings.timeouts
        tokenizer, context = tokenizer_of(settings)
        pool = ReplicaPool(
            settings.replicas,
            wakes=settings.scaling.scales_to_zero,
            tokenizer=tokenizer,
            context=context,
            names=(find_model(settings.model)[1],) if settings.model else (),
            key=engine_key(settings),
            connect_timeout=timeouts.upstream_connect,
        )
        await self._ending.enter_async_context(pool)
        stack = Gateway(pool, settings, replicas=pool, replica_headers=pool.headers)
        await self._ending.enter_async_context(stack)
        stack.set_gateways(settings.cluster.gateways)
        if settings.limits.redis is not None:
            await self._ending.enter_async_context(
                stack.sharing([identity(f"ray://{ray.get_runtime_context().gcs_address}")])
            )
        pool.on_capacity = stack.set_capacity
        name = f"{os.uname().nodename}-{os.getpid()}"
        discovery = ServeDiscovery(ENGINE, ENGINE_ROUTE)
        tasks = [
            supervise("discovery", lambda: discovery.run(pool.update)),
            supervise("load", lambda: tell(name, lambda: measure(stack, pool))),
        ]
        self._ending.push_async_callback(_end, tasks)
        self._app = stack.app

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except BaseException as error:
            await self._ending.aclose()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._ending.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def measure(stack: Gateway, pool: ReplicaPool) -> Load:
    """What this gateway has to do now."""
    scheduler = stack.scheduler
    return Load(
        tokens=scheduler.room.tokens,
        queued_tokens=scheduler.queued_tokens,
        requests=scheduler.room.requests + scheduler.queued_requests,
        tokens_per_replica=pool.tokens_per_replica,
    )


def tokenizer_of(settings: Settings) -> tuple[Tokenizer | None, int | None]:
    """The model's tokenizer and context; None and None where the model is not at hand: the replicas tell then."""
    model = find_model(settings.model)[0] if settings.model else ""
    context = settings.engine.max_model_len
    with contextlib.suppress(SetupError):
        geometry = read_geometry(model, settings.engine.dtype) if model else None
        context = context or (geometry.context if geometry else None)
    for folder in (settings.tokenizer, model):
        if folder:
            with contextlib.suppress(SetupError):
                return Tokenizer.load(folder), context
    return None, context


async def _end(tasks: list["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
