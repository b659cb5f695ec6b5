"""The RayService: our Serve config, and the cluster that KubeRay makes for it."""

from importlib.metadata import PackageNotFoundError, version

from synthia_vllm.cluster.config import ray_environment, serve_config
from synthia_vllm.errors import SetupError
from synthia_vllm.manifests.common import image, in_cluster
from synthia_vllm.manifests.files import to_yaml
from synthia_vllm.manifests.kubernetes import base, pod
from synthia_vllm.manifests.kubernetes.pod import Object
from synthia_vllm.manifests.sizing import Sizing
from synthia_vllm.settings import Settings

SERVE_LABEL = {"ray.io/cluster-owner": "synthia"}
GCS_PASSWORD = "gcs_redis"  # in the Secret of all other secrets; none where Redis asks for none
# Else all that Ray's processes say, our request log too, is in files that go with the pod.
TO_THE_CONTAINERS_OUTPUT = {"RAY_LOG_TO_STDERR": "1", "RAY_SERVE_LOG_TO_STDERR": "1"}
_AGENT_PORT = 52365  # Ray's agent, which knows whether this node's raylet lives
_STORE = {"object-store-memory": str(128 * 2**20)}  # nothing large goes through Ray; /dev/shm is for vLLM's workers
_START_S = 1800  # weights come from a volume and are compiled for
_ENGINES = "engines"  # the group of pods; Ray labels its nodes by it


def ray_service(settings: Settings, sizing: Sizing, vllm_options: list[str]) -> Object:
    """The object; `spec.serveConfigV2` is what `synthia-vllm cluster config` prints for the same settings."""
    config = serve_config(in_pod(settings, sizing), vllm_options)
    surge = settings.cluster.surge
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": pod.meta(pod.NAME),
        "spec": {
            "serveConfigV2": to_yaml(config),
            # Options of ours roll within the cluster, replica by replica. Another image is another cluster: beside the
            # old one where there is room for both.
            "upgradeStrategy": {"type": "NewCluster" if surge else "None"},
            "excludeHeadPodFromServeSvc": True,
            "rayClusterDeletionDelaySeconds": sizing.grace_s,
            "rayClusterConfig": {
                "rayVersion": _ray_version(),
                # All who speak to Ray's ports show a token, which KubeRay makes and keeps in a Secret.
                "authOptions": {"mode": "token"},
                **_fault_tolerance(settings),
                **_autoscaler(settings),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0", **_STORE},
                    "template": _head(settings, sizing),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": _ENGINES,
                        **_workers(settings),
                        "rayStartParams": dict(_STORE),
                        "template": _worker(settings, sizing),
                    }
                ],
            },
        },
    }


def in_pod(settings: Settings, sizing: Sizing) -> Settings:
    """The settings as they hold inside of the pods."""
    told = in_cluster(settings, model=pod.model_folder(settings, sizing), gpus=sizing.gpus)
    # A gateway on the head would go with it, without a drain. Where no other pod may be left, it has to be there.
    if not settings.deploy.keda and not settings.scaling.scales_to_zero and not settings.cluster.gateway_nodes:
        told.cluster = told.cluster.model_copy(update={"gateway_nodes": {"ray.io/node-group": _ENGINES}})
    return told


def _workers(settings: Settings) -> Object:
    """One pod takes a node. Where Ray scales, it asks for pods as replicas need them."""
    most = settings.deploy.nodes
    least = most if settings.scaling.max_replicas is None else min(settings.scaling.min_replicas, 1)
    return {"replicas": least, "minReplicas": least, "maxReplicas": most}


def disruption_budgets(settings: Settings) -> list[Object]:
    """By the number that has to stay: a RayCluster has no /scale, without which Kubernetes knows no `maxUnavailable`.

    Its controller then allows no eviction at all, and a drain hangs (kubernetes/pkg/controller/disruption). A head
    whose GCS is not kept in Redis takes the cluster along: it is moved on purpose.
    """
    engines = base.disruption_budget("engine", {"minAvailable": max(_workers(settings)["minReplicas"] - 1, 0)})
    head = base.disruption_budget("head", {"minAvailable": 1})
    return [engines] if settings.deploy.gcs_redis else [engines, head]


def _autoscaler(settings: Settings) -> Object:
    if settings.scaling.max_replicas is None:
        return {}
    small = {"cpu": "500m", "memory": "512Mi"}
    options = {
        "version": "v2",
        "idleTimeoutSeconds": max(60, int(settings.scaling.downscale_delay_s)),
        "resources": {"requests": small, "limits": dict(small)},
        "securityContext": pod.container_security(),
    }
    return {"enableInTreeAutoscaling": True, "autoscalerOptions": options}


def _fault_tolerance(settings: Settings) -> Object:
    """With what the GCS knows kept in Redis, a head that is lost comes back to the same cluster."""
    if settings.deploy.gcs_redis is None:
        return {}
    password = {"valueFrom": {"secretKeyRef": {"name": pod.SECRET, "key": GCS_PASSWORD, "optional": True}}}
    return {"gcsFaultToleranceOptions": {"redisAddress": settings.deploy.gcs_redis, "redisPassword": password}}


def _head(settings: Settings, sizing: Sizing) -> Object:
    memory = {"cpu": "1", "memory": "4Gi"}
    container = _container("ray-head", settings, sizing) | {
        "ports": [
            {"name": "gcs", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "serve", "containerPort": settings.port},
        ],
        "resources": {"requests": memory, "limits": dict(memory)},
        "startupProbe": pod.http_probe("/api/gcs_healthz", "dashboard", period=5, failures=60),
        # Not /ready: KubeRay deploys the applications only when the head is ready.
        "readinessProbe": pod.http_probe("/api/gcs_healthz", "dashboard", period=5, failures=3),
        "livenessProbe": pod.http_probe("/api/gcs_healthz", "dashboard", period=10, failures=12),
    }
    takes_clients = pod.TAKES_CLIENTS if settings.scaling.scales_to_zero else {}
    return _template(container, "head", settings, sizing, labels=takes_clients)


def _worker(settings: Settings, sizing: Sizing) -> Object:
    container = _container("ray-worker", settings, sizing, RAY_NODE_TYPE_NAME=_ENGINES) | {
        "ports": [{"name": "serve", "containerPort": settings.port}],
        "resources": pod.resources(settings, sizing),
        "startupProbe": pod.http_probe("/api/local_raylet_healthz", _AGENT_PORT, period=5, failures=_START_S // 5),
        # Clients are sent where HAProxy reaches a gateway whose engines generate, or that wakes one.
        "readinessProbe": pod.http_probe("/ready", "serve", period=5, failures=3, timeout=10),
        # Serve heals replicas by itself; the pod is only restarted with its raylet.
        "livenessProbe": pod.http_probe("/api/local_raylet_healthz", _AGENT_PORT, period=10, failures=12),
        "lifecycle": pod.drain_hook(settings, settings.cluster.drain_s),
    }
    return _template(container, "engine", settings, sizing, labels=pod.TAKES_CLIENTS)


def _container(name: str, settings: Settings, sizing: Sizing, **variables: str) -> Object:
    variables = ray_environment(settings) | TO_THE_CONTAINERS_OUTPUT | {"HF_HUB_OFFLINE": "1"} | variables
    return {
        "name": name,
        "image": image(settings, sizing.flavour),
        "imagePullPolicy": "IfNotPresent",
        "env": pod.environment(variables),
        "securityContext": pod.container_security(),
        "volumeMounts": pod.mounts(sizing),
    }


def _template(container: Object, component: str, settings: Settings, sizing: Sizing, *, labels: Object) -> Object:
    selector = pod.labels(component)
    return {
        "metadata": {"labels": selector | labels},
        "spec": {
            "serviceAccountName": pod.NAME,
            "automountServiceAccountToken": component == "head" and settings.scaling.max_replicas is not None,
            "terminationGracePeriodSeconds": sizing.grace_s,
            "securityContext": pod.pod_security(),
            **(pod.all_pods(settings) if component == "head" else pod.engine_pods(settings, sizing)),
            "topologySpreadConstraints": pod.spread(selector),
            **pod.model_is_there(settings, sizing),
            "containers": [container],
            "volumes": pod.volumes(sizing),
        },
    }


def _ray_version() -> str:
    try:
        return version("ray")
    except PackageNotFoundError:
        raise SetupError(
            "Ray is not installed here, and a RayService names its version; install the extra `cluster`"
        ) from None
