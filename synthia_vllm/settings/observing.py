"""What is told of requests: log, objectives, metrics, traces."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from synthia_vllm.settings.kinds import Url


class LogSettings(BaseModel):
    """The request log: one line a request."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[Literal["console", "json"], Field(description="for people or for machines")] = "console"
    requests: Annotated[bool, Field(description="one line a request")] = True
    texts: Annotated[bool, Field(description="prompts too: what users write, in the log")] = False


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
    user_histograms: Annotated[
        bool, Field(description="latency histograms by user, too: a hundred lines or so for each of them and model")
    ] = False
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
