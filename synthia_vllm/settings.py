"""One settings tree: YAML file < files of secrets < environment (`SYNTHIA_…`) < command line.

`SYNTHIA_PROMPT__STYLE=script`, `--prompt.style script` and `prompt: {style: script}` in the file set the same field.
`SYNTHIA_SECRETS` names a folder with one file a secret (`access__secret`, `access__database`, …): what systemd's
credentials, Kubernetes' and Docker's secrets are.
"""

import difflib
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from synthia_vllm.config_file import read_config
from synthia_vllm.errors import SetupError
from synthia_vllm.prompt import MarkerPolicy, Style
from synthia_vllm.secret_urls import open_url, redis_url, without

CONFIG_VARIABLE = "SYNTHIA_CONFIG"
SECRETS_VARIABLE = "SYNTHIA_SECRETS"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Untold:
    """Of a field whose value is in the open where it is right; a wrong one may be a secret, and is not repeated."""


Url = Annotated[str, AfterValidator(open_url), Untold]


class PromptSettings(BaseModel):
    """The Synthia prompt format."""

    model_config = ConfigDict(extra="forbid")

    style: Annotated[
        Style, Field(description="card: the card's format block; script: byte for byte the card's Python")
    ] = "card"
    turn_end: Annotated[str, Field(description="text after each past answer, for instance </s>")] = ""
    role_markers: Annotated[
        MarkerPolicy, Field(description="what to do with USER: and the like inside what a user writes")
    ] = "allow"
    cache_sharing: Annotated[
        Literal["all", "group", "user"],
        Field(
            description="who finds whose beginnings in the engine's prefix cache: all; group: users alike up to the "
            "first `:` of their names; user: each his own"
        ),
    ] = "user"


class EngineSettings(BaseModel):
    """vLLM. Anything not here can be given to vLLM itself after `--`."""

    model_config = ConfigDict(extra="forbid")

    max_model_len: Annotated[
        PositiveInt | None, Field(description="context in tokens (default: what the model was made for)")
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Field(description="type of weights and KV cache")
    ] = "auto"
    kv_cache_gib: Annotated[
        PositiveFloat | None,
        Field(
            description="KV cache in GiB (default: 2 for the demo, half of a CPU's free memory, vLLM's share of a GPU)"
        ),
    ] = None
    tensor_parallel_size: Annotated[
        PositiveInt | None, Field(description="GPUs that share the model (default: as many as divide its heads)")
    ] = None
    profile: Annotated[
        str,
        Field(
            description="measured vLLM options: auto (those of this GPU and model, if any), none, a name or a "
            "file; what is given after -- wins"
        ),
    ] = "auto"
    compile: Annotated[
        bool, Field(description="torch.compile on a CPU: about a minute more to start, a little faster at few streams")
    ] = False
    fork: Annotated[
        bool | None,
        Field(
            description="on a CPU: fork vLLM's processes from one that imports beside the server; starts in half the "
            "time, computes 4 to 7 % slower (default: for the demo)"
        ),
    ] = None


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
        Field(description="redis://… shared by several gateways (default: counted in this process)"),
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
            description="`gateway` only: gateways before the same engines, each fills its part of them (default: as "
            "many as limits.redis knows of, without it this one alone); those that Redis knows beyond it count too"
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


class LogSettings(BaseModel):
    """The request log: one line a request."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[Literal["console", "json"], Field(description="for people or for machines")] = "console"
    requests: Annotated[bool, Field(description="one line a request")] = True
    texts: Annotated[bool, Field(description="prompts too: what users write, in the log")] = False


class TimeoutSettings(BaseModel):
    """Seconds that the network's edges get."""

    model_config = ConfigDict(extra="forbid")

    headers: Annotated[PositiveFloat, Field(description="from the connection's start to the end of the headers")] = 10.0
    body: Annotated[PositiveFloat, Field(description="without another byte of the body")] = 20.0
    write: Annotated[PositiveFloat, Field(description="without a client taking any of its reply")] = 60.0
    idle: Annotated[PositiveFloat, Field(description="between two requests on a connection")] = 30.0
    upstream_connect: Annotated[PositiveFloat, Field(description="to connect to an upstream")] = 5.0
    upstream_read: Annotated[
        PositiveFloat, Field(description="without another byte from an upstream that is no vLLM; of vLLM, see cluster")
    ] = 300.0


class ClusterSettings(BaseModel):
    """Several replicas: where they run, which one a request goes to, and what happens when one is lost."""

    model_config = ConfigDict(extra="forbid")

    address: Annotated[
        str | None,
        Field(
            description="dashboard of a running Ray cluster, HOST:PORT, Ray's own port is 8265 (default: a local Ray, "
            "started if need be)"
        ),
    ] = None
    replicas: Annotated[
        NonNegativeInt, Field(description="engine replicas; with max-replicas, those to start with")
    ] = 1
    min_replicas: Annotated[NonNegativeInt, Field(description="fewest that scaling leaves; 0: none without load")] = 1
    max_replicas: Annotated[
        PositiveInt | None, Field(description="most that scaling starts (default: no scaling, a fixed number)")
    ] = None
    target_load: Annotated[
        float, Field(gt=0, le=2, description="tokens in flight and queued over what the KV caches hold, to scale for")
    ] = 0.8
    upscale_delay_s: Annotated[NonNegativeFloat, Field(description="load must last so long before one is added")] = 5.0
    downscale_delay_s: Annotated[NonNegativeFloat, Field(description="and so long before one is taken away")] = 300.0
    gateways: Annotated[PositiveInt, Field(description="gateway replicas")] = 1
    cpus_per_replica: Annotated[
        PositiveFloat | None,
        Field(
            description="CPUs that an engine replica takes with Ray, and without a GPU works on (default: hardly any "
            "with Ray, an even share of its machine)"
        ),
    ] = None
    accelerator: Annotated[
        Literal["auto", "cpu", "gpu"],
        Field(
            description="nodes that engine replicas are planned for; cpu and gpu wait until there is one, auto takes "
            "those that are up: GPUs if any, else CPUs"
        ),
    ] = "auto"
    pipeline_parallel_size: Annotated[PositiveInt, Field(description="nodes that share the model, layer by layer")] = 1
    surge: Annotated[
        bool, Field(description="a rollout starts a new replica before it stops an old one; needs room for one more")
    ] = False
    routing: Annotated[
        Literal["affinity", "round_robin"],
        Field(description="affinity: a conversation stays where its KV cache is; round_robin: in turn"),
    ] = "affinity"
    max_load_factor: Annotated[
        float, Field(ge=1, description="a conversation leaves a replica busier than so many times the mean")
    ] = 1.5
    canary_period_s: Annotated[
        PositiveFloat, Field(description="a replica is asked so often what it does, and for one token if nothing")
    ] = 2.0
    canary_deadline_s: Annotated[
        PositiveFloat,
        Field(
            description="one that has work and shows no progress for so long, and the time of the prompts in front, is "
            "out, and its streams go on elsewhere"
        ),
    ] = 10.0
    handover_s: Annotated[
        NonNegativeFloat, Field(description="streams of a replica that is to stop move to another one after so long")
    ] = 5.0
    slow_start_s: Annotated[
        NonNegativeFloat, Field(description="a new replica gets its full share of requests only after so long")
    ] = 10.0
    max_losses: Annotated[
        PositiveInt, Field(description="a request under which so many replicas were lost is refused")
    ] = 3
    max_resumes: Annotated[PositiveInt, Field(description="a request moves to another replica at most so often")] = 16
    replay: Annotated[
        bool | None,
        Field(
            description="replies with a grammar, a seed or penalties go on elsewhere too; keeps vLLM's newer model "
            "runner and speculative decoding from GPUs (default: on without a GPU)"
        ),
    ] = None
    start_wait_s: Annotated[
        PositiveFloat,
        Field(
            description="longest that a request waits while there is no replica at all; `gateway`: as "
            "--fair.max-wait-s, if not set"
        ),
    ] = 600.0
    max_generation_s: Annotated[PositiveFloat, Field(description="longest that one reply may take")] = 600.0
    drain_s: Annotated[
        PositiveFloat, Field(description="a replica that is to stop gets so long to finish its streams")
    ] = 600.0
    health_period_s: Annotated[
        PositiveFloat, Field(description="Serve asks each replica so often whether its engine is alive")
    ] = 5.0
    health_timeout_s: Annotated[
        PositiveFloat, Field(description="a replica that does not answer that for so long, three times, is replaced")
    ] = 30.0
    max_requests_per_replica: Annotated[
        PositiveInt,
        Field(description="requests that the gateways give a replica at once, or as many as it runs if less"),
    ] = 1024

    @property
    def scales_to_zero(self) -> bool:
        """Whether there may be no replica at all, until a request asks for one."""
        return self.max_replicas is not None and self.min_replicas == 0


class SloTargets(BaseModel):
    """What a request of one priority class is to meet; a target that is not set is not looked at."""

    model_config = ConfigDict(extra="forbid")

    ttft_s: Annotated[PositiveFloat | None, Field(description="to the first token, waiting included; streams only")] = (
        None
    )
    itl_s: Annotated[
        PositiveFloat | None, Field(description="mean time between tokens after the first; streams only")
    ] = None
    e2e_s: Annotated[PositiveFloat | None, Field(description="to the end of the reply")] = None


class SloSettings(BaseModel):
    """Service level objectives: which requests count as met, and how many are to be."""

    model_config = ConfigDict(extra="forbid")

    objective: Annotated[float, Field(gt=0, lt=1, description="share of requests that is to meet its targets")] = 0.99
    interactive: SloTargets = SloTargets(ttft_s=2.0, itl_s=0.2)
    batch: SloTargets = SloTargets(e2e_s=600.0)


class MetricsSettings(BaseModel):
    """The exporter."""

    model_config = ConfigDict(extra="forbid")

    max_users: Annotated[
        PositiveInt, Field(description="users with series of their own, first come; the rest are `other`")
    ] = 200
    max_models: Annotated[
        PositiveInt, Field(description="model names with series of their own, first come; the rest are `other`")
    ] = 20
    replica_wait_s: Annotated[
        PositiveFloat, Field(description="a scrape waits so long for the replicas; what is late comes with the next")
    ] = 0.2


class TracingSettings(BaseModel):
    """OpenTelemetry traces, from the gateway through the engine; off without an endpoint."""

    model_config = ConfigDict(extra="forbid")

    otlp_endpoint: Annotated[
        Url | None, Field(description="an OTLP collector: http://HOST:4317 (gRPC) or http://HOST:4318/v1/traces (HTTP)")
    ] = None
    protocol: Annotated[
        Literal["grpc", "http/protobuf"], Field(description="how the collector is spoken to, ours and vLLM's spans")
    ] = "grpc"
    sample_ratio: Annotated[
        float, Field(ge=0, le=1, description="share of requests traced, where the client brings no trace of its own")
    ] = 1.0


class DeploySettings(BaseModel):
    """Where it is to run: what `synthia-vllm deploy render` has to know of machines that it does not see."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?$", description="of the Kustomize overlay")
    ] = "site"
    image: Annotated[
        str, Field(description="container image (default tag: the version, with -cuda or -cpu); a tag or digest wins")
    ] = "synthia-vllm"
    namespace: Annotated[str, Field(description="Kubernetes namespace")] = "synthia"
    domain: Annotated[str, Field(description="name that clients use; certificates are for it")] = "synthia.example.com"
    nodes: Annotated[PositiveInt, Field(description="machines that engines run on")] = 1
    gpus_per_node: Annotated[NonNegativeInt, Field(description="NVIDIA GPUs in each of them")] = 0
    gpu_memory_gib: Annotated[PositiveFloat, Field(description="memory of one GPU")] = 80.0
    cpus_per_node: Annotated[PositiveInt, Field(description="CPUs that each of them gives")] = 4
    memory_per_node_gib: Annotated[PositiveFloat, Field(description="memory that each of them gives")] = 16.0
    grace_period_s: Annotated[
        PositiveInt | None,
        Field(description="from SIGTERM to SIGKILL (default: what draining needs); never less than that"),
    ] = None
    model_revision: Annotated[str, Field(description="commit of the model on the hub; a branch moves")] = "main"
    keda: Annotated[
        bool, Field(description="Kubernetes without Ray: one server a pod, scaled by KEDA to cluster.max-replicas")
    ] = False
    gcs_redis: Annotated[
        Annotated[str, Untold] | None,
        Field(
            pattern=r"^[^\s:/@]+:\d+$",
            description="Redis, HOST:PORT, in which Ray's head keeps what it knows: one that is lost comes back to its "
            "cluster; its password is the secret gcs_redis",
        ),
    ] = None
    instance_type: Annotated[str, Field(description="`ray` in a cloud: the machine type that engines run on")] = (
        "g6e.2xlarge"
    )
    workers: Annotated[
        list[str], Field(description="`ray` on machines of your own: their names; the head is the first of them")
    ] = []


class Settings(BaseSettings):
    """Serve Synthia on this machine: an OpenAI- and Anthropic-compatible server that speaks the Synthia format."""

    model_config = SettingsConfigDict(
        env_prefix="SYNTHIA_",
        env_nested_delimiter="__",
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    config: Annotated[
        Path | None, Field(description=f"YAML file with any of these options; also {CONFIG_VARIABLE}")
    ] = None
    model: Annotated[
        str | None,
        Field(description="folder, hub id, or 'demo' (default: Synthia-v3.0-11B with a GPU, demo without)"),
    ] = None
    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 picks a free one")] = 8000
    insecure: Annotated[bool, Field(description="allow an address that others can reach, without keys")] = False
    upstream: Annotated[
        list[Url], Field(description="`gateway` only: URL of an OpenAI-compatible engine; may be given several times")
    ] = []
    upstream_key: Annotated[
        SecretStr | None, Field(description="`gateway` only: API key that the engines themselves ask for")
    ] = None
    resume: Annotated[
        bool,
        Field(
            description="`gateway` only: a reply whose engine is lost goes on from another, where they are vLLM; all "
            "of them have one and the same model"
        ),
    ] = True
    tokenizer: Annotated[
        str | None,
        Field(
            description="`gateway` only: folder with the engine's tokenizer.json, to count prompts (default: estimate)"
        ),
    ] = None
    drain_timeout: Annotated[
        NonNegativeFloat, Field(description="seconds that running requests get to finish after SIGTERM")
    ] = 60.0
    max_body_bytes: Annotated[PositiveInt, Field(description="largest request body")] = 4 * 2**20
    log_file: Annotated[
        str | None, Field(description="where the engine's log goes; - for the terminal (default: in the cache folder)")
    ] = None
    page: Annotated[bool, Field(description="the status page at /")] = True
    cors_origins: Annotated[
        list[Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]],
        Field(
            description="origins, such as https://chat.example.com, or *, whose pages may ask from a browser; may be "
            "given several times (default: none but this server's own page)"
        ),
    ] = []
    prompt: PromptSettings = PromptSettings()
    engine: EngineSettings = EngineSettings()
    access: AccessSettings = AccessSettings()
    limits: LimitsSettings = LimitsSettings()
    fair: FairSettings = FairSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    log: LogSettings = LogSettings()
    cluster: ClusterSettings = ClusterSettings()
    slo: SloSettings = SloSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    deploy: DeploySettings = DeploySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if folder := os.environ.get(SECRETS_VARIABLE):
            sources.append(NestedSecretsSettingsSource(file_secret_settings, folder, secrets_prefix=""))
        if path := os.environ.get(CONFIG_VARIABLE):
            sources.append(InitSettingsSource(settings_cls, read_config(path)))
        return tuple(sources)


def fields_with(wanted: Any, model: type[BaseModel] = Settings) -> list[tuple[str, ...]]:
    """Paths of all settings whose type mentions something: `SecretStr` for those that hold a secret."""

    def mentions(annotation: Any) -> bool:
        return annotation is wanted or any(mentions(part) for part in get_args(annotation))

    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        if (group := group_of(field)) is not None:
            found += [(name, *path) for path in fields_with(wanted, group)]
        elif mentions(field.annotation):
            found.append((name,))
    return found


def field_of(path: str) -> FieldInfo | None:
    """The setting, or the group of settings, at `group.field`; None where there is none."""
    model: type[BaseModel] | None = Settings
    field = None
    for name in path.split("."):
        field = model.model_fields.get(name) if model else None
        model = group_of(field) if field else None
    return field


def group_of(field: FieldInfo) -> type[BaseModel] | None:
    """The group of settings that a field is, if it is one."""
    found = field.annotation
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def option_of(path: str, *, no: bool = False) -> str:
    """`--group.some-field`, or the option that says no to it."""
    return f"--{'no-' if no else ''}{path.replace('_', '-')}"


def path_of(option: str) -> str:
    """`group.some_field` of an option, of one that says no to it as well."""
    path = option.removeprefix("--").replace("-", "_")
    positive = path.removeprefix("no_")
    return positive if field_of(path) is None and field_of(positive) else path


SECRETS = tuple(fields_with(SecretStr))  # never written down: they come as files, or by the environment


def dump(settings: Settings, **which: Any) -> dict[str, Any]:
    """What differs from the defaults, as JSON has it, less the secrets; `which` is pydantic's include and exclude."""
    dumped: dict[str, Any] = settings.model_dump(mode="json", exclude_defaults=True, **which)
    for *groups, name in SECRETS:
        within = dumped
        for group in groups:
            within = within.get(group, {})
        within.pop(name, None)
    return {key: value for key, value in dumped.items() if value != {}}


def refuse_gateways_options(settings: Settings, prog: str) -> None:
    """For a command that loads its own engine. Raises SetupError where engines elsewhere are named."""
    for name in ("upstream", "upstream_key", "resume", "tokenizer"):
        if getattr(settings, name) != Settings.model_fields[name].default:
            raise SetupError(
                f"--{name.replace('_', '-')}: `{prog}` loads an engine here and asks none elsewhere; "
                "use `synthia-vllm gateway`, or leave it out"
            )


def load_settings(argv: Sequence[str] = ()) -> Settings:
    """The settings from all sources; `argv` is a command line without the command's name.

    Raises SetupError that names the option, its value and what would be right.
    """
    config = _option(argv, "--config")
    if config is not None:
        os.environ[CONFIG_VARIABLE] = config
    secrets = os.environ.get(SECRETS_VARIABLE)
    if secrets and not Path(secrets).is_dir():
        raise SetupError(f"{SECRETS_VARIABLE} {secrets}: there is no such folder; it holds one file a secret")
    try:
        source: CliSettingsSource[Settings] = CliSettingsSource(
            Settings, cli_parse_args=list(argv), cli_exit_on_error=False, parse_args_method=_parse
        )
        return Settings(_cli_settings_source=source)  # type: ignore[call-arg]
    except ValidationError as error:
        raise SetupError("\n".join(_explain(problem) for problem in error.errors())) from None
    except SettingsError as error:  # a command line or a variable that can't be read at all
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise SetupError(without(f"{str(error).removeprefix('error parsing CLI: ')}{cause}", argv)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{SECRETS_VARIABLE} {secrets}: {error}") from None


def _parse(parser: ArgumentParser, argv: Sequence[str], namespace: Namespace | None = None) -> Namespace:
    """Parses a command line, and refuses what it does not know without telling all that it does know."""
    found, unknown = parser.parse_known_args(argv, namespace)
    if unknown:
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        raise SetupError(
            "\n".join(map(_no_such, options)) or without(f"{unknown[0]!r} belongs to no option; see --help", unknown)
        )
    return found


def _no_such(option: str) -> str:
    if not re.fullmatch(r"[\w.-]+", option):  # it may be a URL with its password
        return "a value stands where the name of an option should be; see --help"
    usual = option.replace("_", "-").lower()
    options = list(_options(Settings))
    below = [it for it in options if it.endswith(f".{usual.lstrip('-')}")]  # its group was left out
    nearest = below or difflib.get_close_matches(usual, options, n=1)
    if nearest == [option]:  # right on the command line
        return f"{option[2:]}: in a file it is written {option[2:].replace('-', '_')}"
    return f"{option}: there is no such option; {f'did you mean {nearest[0]}?' if nearest else 'see --help'}"


def _options(model: type[BaseModel], prefix: str = "--") -> Iterator[str]:
    """All options, as the command line has them."""
    for name, field in model.model_fields.items():
        option = prefix + name.replace("_", "-")
        inner = group_of(field)
        yield from _options(inner, f"{option}.") if inner else [option]


def _option(argv: Sequence[str], name: str) -> str | None:
    """The value of one option, wanted before the parser can run (the parser's defaults come from that file)."""
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _explain(problem: object) -> str:
    assert isinstance(problem, dict)
    option = "--" + ".".join(str(part).replace("_", "-") for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _no_such(option)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    told = tuple(str(part) for part in problem["loc"])
    kept = any(path[: len(told)] == told[: len(path)] for path in (*fields_with(SecretStr), *fields_with(Untold)))
    value = "" if kept else without(f" {problem['input']!r}", [str(problem["input"])])
    return f"{option}{value}: {message.removeprefix('value error, ')}"
