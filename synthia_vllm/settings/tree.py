"""The tree: all settings by groups, and where they come from."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt, SecretStr
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from synthia_vllm.config_file import read_config
from synthia_vllm.settings.cluster import ClusterSettings, ReplicasSettings, ScalingSettings
from synthia_vllm.settings.deploy import DeploySettings
from synthia_vllm.settings.gateway import LOOPBACK, AccessSettings, FairSettings, LimitsSettings, TimeoutSettings
from synthia_vllm.settings.kinds import Url
from synthia_vllm.settings.model import EngineSettings, PromptSettings
from synthia_vllm.settings.observing import LogSettings, MetricsSettings, SloSettings, TracingSettings

CONFIG_VARIABLE = "SYNTHIA_CONFIG"
SECRETS_VARIABLE = "SYNTHIA_SECRETS"
PREFIX, DELIMITER = "SYNTHIA_", "__"  # of the environment's variables


class Settings(BaseSettings):
    """Serve Synthia on this machine: an OpenAI- and Anthropic-compatible server that speaks the Synthia format."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
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
    admin_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="port of its own for /admin, /metrics and /sd, which the other then does not have (default: "
            "the same port)",
        ),
    ] = None
    admin_host: Annotated[
        str | None, Field(description="address that admin-port is at, such as 127.0.0.1 (default: the same as host)")
    ] = None
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
    gateways: Annotated[
        PositiveInt,
        Field(
            le=256,
            description="`gateway` and `serve` only: processes on this port, to use several cores; more than one need "
            "limits.redis",
        ),
    ] = 1
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
    openapi: Annotated[bool, Field(description="the OpenAPI document of the routes at /openapi.json")] = True
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
    scaling: ScalingSettings = ScalingSettings()
    replicas: ReplicasSettings = ReplicasSettings()
    slo: SloSettings = SloSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    deploy: DeploySettings = DeploySettings()

    @property
    def this_machine_only(self) -> bool:
        """Whether all addresses that it listens on are this machine's own."""
        return {self.host, self.admin_host or self.host} <= set(LOOPBACK)

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
