"""The machines that files are rendered for."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from synthia_vllm.settings.kinds import Untold, Url

_Taint = Annotated[str, Field(pattern=r"^[^\s=:]+(=[^\s=:]*)?:(NoSchedule|PreferNoSchedule|NoExecute)$")]


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
    cpus_per_node: Annotated[PositiveInt, Field(description="CPUs that each of them has")] = 4
    reserved_cpus: Annotated[
        NonNegativeFloat,
        Field(
            description="Kubernetes: CPUs of a node that its own and others' pods have; engines' pods ask for the rest"
        ),
    ] = 0.5
    memory_per_node_gib: Annotated[PositiveFloat, Field(description="memory that each of them gives")] = 16.0
    grace_period_s: Annotated[
        PositiveInt | None,
        Field(description="from SIGTERM to SIGKILL (default: what draining needs); never less than that"),
    ] = None
    model_revision: Annotated[str, Field(description="commit of the model on the hub; a branch moves")] = "main"
    node_selector: Annotated[
        dict[str, str], Field(description="Kubernetes: labels of the nodes that engines run on, as LABEL=VALUE")
    ] = {}
    tolerations: Annotated[
        list[_Taint],
        Field(
            description="Kubernetes: taints of those nodes, as KEY=VALUE:EFFECT or KEY:EFFECT; NVIDIA's is among them"
        ),
    ] = []
    runtime_class: Annotated[str | None, Field(description="Kubernetes: the RuntimeClass of engines' pods")] = None
    priority_class: Annotated[str | None, Field(description="Kubernetes: the PriorityClass of all pods")] = None
    pull_secrets: Annotated[
        list[str],
        Field(description="Kubernetes: Secrets that the image's registry asks for; may be given several times"),
    ] = []
    storage_class: Annotated[
        str | None, Field(description="Kubernetes: StorageClass of the model's volume (default: the cluster's own)")
    ] = None
    ingress_class: Annotated[
        str | None,
        Field(description="Kubernetes: an Ingress of this class for deploy.domain, TLS by the Secret synthia-tls"),
    ] = None
    parent_gateway: Annotated[
        str | None,
        Field(
            pattern=r"^([-a-z0-9]+/)?[-a-z0-9]+$",
            description="Kubernetes: an HTTPRoute for deploy.domain below this Gateway, NAME or NAMESPACE/NAME",
        ),
    ] = None
    egress_ports: Annotated[
        list[Annotated[int, Field(ge=1, le=65535)]],
        Field(
            description="Kubernetes: ports outside of its own pods and DNS that pods may reach: the hub, PostgreSQL, "
            "Redis, a trace collector, Kubernetes' API"
        ),
    ] = [443, 4317, 4318, 5432, 6379, 6443]
    runbook: Annotated[
        Url | None,
        Field(description="where your people read docs/runbook.md: alerts link to it (default: its path alone)"),
    ] = None
    monitor_labels: Annotated[
        dict[str, str],
        Field(description="Kubernetes: labels by which your Prometheus finds monitors and rules, such as release=NAME"),
    ] = {}
    prometheus: Annotated[Url, Field(description="Kubernetes with deploy.keda: the Prometheus that KEDA asks")] = (
        "http://prometheus-operated.monitoring.svc:9090"
    )
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
