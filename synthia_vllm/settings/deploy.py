"""The machines that files are rendered for."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from synthia_vllm.settings.kinds import Untold


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
        bool, Field(description="Kubernetes without Ray: one server a pod, scaled by KEDA to scaling.max-replicas")
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
