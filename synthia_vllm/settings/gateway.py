"""The gateway: who may use it, how much each may have, and how long the network gets."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)

from synthia_vllm.secret_urls import redis_url

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class AccessSettings(BaseModel):
    """Who may use the server."""

    model_config = ConfigDict(extra="forbid")

    mode: Annotated[
        Literal["auto", "open", "keys"],
        Field(
            description="keys: every request needs one; open: none does; auto: open on this machine's own address only"
        ),
    ] = "auto"
    database: Annotated[
        SecretStr | None,
        Field(
            description="SQLAlchemy URL of keys and usage (default: SQLite in the data folder); PostgreSQL: "
            "postgresql+psycopg://user@host/name"
        ),
    ] = None
    secret: Annotated[
        SecretStr | None,
        Field(
            description="what key hashes are keyed with (default: made once, in the data folder); the same everywhere"
        ),
    ] = None
    hosts: Annotated[
        list[Annotated[str, Field(pattern=r"^([^\s/:]+|[0-9A-Fa-f:]+)$")]],
        Field(
            description="names, such as synthia.example.com, that a request's Host may have; may be given several "
            "times (default: any with keys, without keys this machine's own)"
        ),
    ] = []
    proxies: Annotated[
        list[IPvAnyNetwork],
        Field(
            description="addresses or networks of proxies whose X-Forwarded-For is believed; may be given several times"
        ),
    ] = []
    max_connections: Annotated[
        PositiveInt,
        Field(description="open at once; beyond, the longest idle is closed, then the one longest without a request"),
    ] = 16384
    max_connections_per_address: Annotated[
        PositiveInt,
        Field(
            description="of one client (of IPv6, a network of /64); not of this machine and of proxies, whose "
            "clients' requests count instead"
        ),
    ] = 4096


class LimitsSettings(BaseModel):
    """Where users' limits are counted, and what holds for users without limits of their own."""

    model_config = ConfigDict(extra="forbid")

    redis: Annotated[
        Annotated[SecretStr, AfterValidator(redis_url)] | None,
        Field(description="redis://… by which gateways share limits and queue (default: in process)"),
    ] = None
    on_loss: Annotated[
        Literal["closed", "local"],
        Field(
            description="while Redis is gone, or the database that knows what a month has used: closed: refuse with "
            "503; local: each gateway counts for itself, and a month that is not known passes"
        ),
    ] = "local"
    requests_per_minute: Annotated[PositiveInt | None, Field(description="default for users without their own")] = None
    tokens_per_minute: Annotated[PositiveInt | None, Field(description="default for users without their own")] = None
    concurrent_requests: Annotated[PositiveInt | None, Field(description="default for users without their own")] = None
    tokens_per_month: Annotated[PositiveInt | None, Field(description="default for users without their own")] = None


class FairSettings(BaseModel):
    """How users share the engine (Virtual Token Counter, Sheng et al., OSDI 2024), and when it is overloaded."""

    model_config = ConfigDict(extra="forbid")

    policy: Annotated[
        Literal["vtc", "fcfs"], Field(description="vtc: the user served least goes first; fcfs: who came first")
    ] = "vtc"
    prompt_cost: Annotated[PositiveFloat, Field(description="cost of one prompt token")] = 1.0
    generated_cost: Annotated[PositiveFloat, Field(description="cost of one generated token")] = 2.0
    max_in_flight_tokens: Annotated[
        PositiveInt | None, Field(description="tokens the engine holds at once (default: its KV cache, as it tells)")
    ] = None
    max_in_flight_requests: Annotated[
        PositiveInt | None, Field(description="requests the engine runs at once (default: its max_num_seqs)")
    ] = None
    gateways: Annotated[
        PositiveInt | None,
        Field(
            description="`gateway` only: gateways before the same engines, each fills its even part of them (default: "
            "this one alone); with limits.redis they share one queue, and this is for as long as Redis is gone"
        ),
    ] = None
    max_queued_requests: Annotated[PositiveInt, Field(description="more are refused with 503")] = 2048
    max_queued_tokens: Annotated[PositiveInt, Field(description="more are refused with 503")] = 4_000_000
    max_wait_s: Annotated[
        PositiveFloat, Field(description="longest wait in the queue; X-Queue-Timeout-S can shorten it")
    ] = 60.0
    batch_ageing_s: Annotated[
        PositiveFloat, Field(description="a batch request that waited so long claims batch's share of the service")
    ] = 30.0
    batch_share: Annotated[
        float, Field(gt=0, lt=1, description="of the service, once batch claims it beside interactive")
    ] = 0.1


class TimeoutSettings(BaseModel):
    """Seconds that the network's edges get."""

    model_config = ConfigDict(extra="forbid")

    headers: Annotated[PositiveFloat, Field(description="from the connection's start to the end of the headers")] = 10.0
    body: Annotated[PositiveFloat, Field(description="without another byte of the body")] = 20.0
    write: Annotated[PositiveFloat, Field(description="without a client taking any of its reply")] = 60.0
    idle: Annotated[PositiveFloat, Field(description="between two requests on a connection")] = 30.0
    database: Annotated[
        PositiveFloat, Field(description="for the database to tell of a key, or of what a month has cost")
    ] = 3.0
    redis: Annotated[
        PositiveFloat, Field(description="for Redis to answer; then it is gone, and --limits.on-loss decides")
    ] = 1.0
    reply_kept: Annotated[
        NonNegativeFloat,
        Field(
            description="that a reply is kept in Redis (limits.redis) after its last token, so that a client who lost "
            "its connection, or its gateway, gets the rest; 0: none is kept"
        ),
    ] = 300.0
    upstream_connect: Annotated[PositiveFloat, Field(description="to connect to an upstream")] = 5.0
    upstream_read: Annotated[
        PositiveFloat, Field(description="without another byte from an upstream that is no vLLM; of vLLM, see replicas")
    ] = 300.0
