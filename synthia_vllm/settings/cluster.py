"""Several replicas: where they run, how many there are, and which one a request goes to."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class ClusterSettings(BaseModel):
    """Where Ray runs, and what is deployed there."""

    model_config = ConfigDict(extra="forbid")

    address: Annotated[
        str | None,
        Field(
            description="dashboard of a running Ray cluster, HOST:PORT, Ray's own port is 8265 (default: a local Ray, "
            "started if need be)"
        ),
    ] = None
    replicas: Annotated[
        NonNegativeInt, Field(description="engine replicas; with scaling.max-replicas, those to start with")
    ] = 1
    gateways: Annotated[PositiveInt, Field(description="gateway replicas")] = 1
    gateway_nodes: Annotated[
        dict[str, str],
        Field(description="labels of the Ray nodes that gateways run on, as LABEL=VALUE (default: any node)"),
    ] = {}
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
    replay: Annotated[
        bool | None,
        Field(
            description="replies with a grammar, a seed or penalties go on elsewhere too; keeps vLLM's newer model "
            "runner and speculative decoding from GPUs (default: on without a GPU)"
        ),
    ] = None
    surge: Annotated[
        bool, Field(description="a rollout starts a new replica before it stops an old one; needs room for one more")
    ] = False
    drain_s: Annotated[
        PositiveFloat, Field(description="a replica that is to stop gets so long to finish its streams")
    ] = 600.0
    health_period_s: Annotated[
        PositiveFloat, Field(description="Serve asks each replica so often whether its engine is alive")
    ] = 5.0
    health_timeout_s: Annotated[
        PositiveFloat, Field(description="a replica that does not answer that for so long, three times, is replaced")
    ] = 30.0


class ScalingSettings(BaseModel):
    """How many engine replicas there are, by load."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: Annotated[NonNegativeInt, Field(description="fewest that scaling leaves; 0: none without load")] = 1
    max_replicas: Annotated[
        PositiveInt | None, Field(description="most that scaling starts (default: no scaling, a fixed number)")
    ] = None
    target_load: Annotated[
        float, Field(gt=0, le=2, description="tokens in flight and queued over what the KV caches hold, to scale for")
    ] = 0.8
    upscale_delay_s: Annotated[NonNegativeFloat, Field(description="load must last so long before one is added")] = 5.0
    downscale_delay_s: Annotated[NonNegativeFloat, Field(description="and so long before one is taken away")] = 300.0

    @property
    def scales_to_zero(self) -> bool:
        """Whether there may be no replica at all, until a request asks for one."""
        return self.max_replicas is not None and self.min_replicas == 0


class ReplicasSettings(BaseModel):
    """How a gateway chooses among replicas, watches them, and goes on when one is lost."""

    model_config = ConfigDict(extra="forbid")

    routing: Annotated[
        Literal["affinity", "round_robin"],
        Field(description="affinity: a conversation stays where its KV cache is; round_robin: in turn"),
    ] = "affinity"
    max_load_factor: Annotated[
        float, Field(ge=1, description="a conversation leaves a replica busier than so many times the mean")
    ] = 1.5
    max_requests_per_replica: Annotated[
        PositiveInt,
        Field(description="requests that the gateways give a replica at once, or as many as it runs if less"),
    ] = 1024
    slow_start_s: Annotated[
        NonNegativeFloat, Field(description="a new replica gets its full share of requests only after so long")
    ] = 10.0
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
    max_losses: Annotated[
        PositiveInt, Field(description="a request under which so many replicas were lost is refused")
    ] = 3
    max_resumes: Annotated[PositiveInt, Field(description="a request moves to another replica at most so often")] = 16
    start_wait_s: Annotated[
        PositiveFloat,
        Field(
            description="longest that a request waits while there is no replica at all; `gateway`: as "
            "--fair.max-wait-s, if not set"
        ),
    ] = 600.0
    max_generation_s: Annotated[PositiveFloat, Field(description="longest that one reply may take")] = 600.0
