"""What is the same for all sizes: who may speak to whom, how many may be away, the metrics, the model's volume."""

import hashlib
import json
import math

import yaml

from synthia_vllm.engine.hardware import GIB
from synthia_vllm.manifests.common import image, rules
from synthia_vllm.manifests.files import shipped
from synthia_vllm.manifests.kubernetes import pod
from synthia_vllm.manifests.kubernetes.pod import Object
from synthia_vllm.manifests.sizing import Sizing
from synthia_vllm.settings import Settings

_JOB_KEPT_S = 7 * 86_400  # its log, until it is removed
SERVICE = "synthia-gateway"
ADMIN_KEY_SECRET = "synthia-metrics-key"


def service_account() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": pod.meta(pod.NAME),
        "automountServiceAccountToken": False,
    }


def gateway_service(settings: Settings) -> Object:
    """Where clients go: pods whose /ready is 200, and the head where there may be no other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": pod.meta(SERVICE, "gateway"),
        "spec": {
            "selector": pod.labels() | pod.TAKES_CLIENTS,
            "ports": [{"name": "http", "port": 80, "targetPort": settings.port, "protocol": "TCP"}],
        },
    }


def metrics_service(settings: Settings) -> Object:
    """What Prometheus scrapes. On Ray the head's HAProxy alone: each node's would bring the same page once more."""
    component = "engine" if settings.deploy.keda else "head"
    port = admin_port(settings) if settings.deploy.keda else settings.port
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": pod.meta("synthia-metrics", "metrics"),
        "spec": {
            "clusterIP": "None",
            "selector": pod.labels(component),
            "ports": [{"name": "http", "port": port, "targetPort": port, "protocol": "TCP"}],
        },
    }


def admin_port(settings: Settings) -> int:
    """Where a pod without Ray has its routes for operators; Ray's HAProxy knows one port for all."""
    return settings.admin_port or settings.port + 1


def network_policies(settings: Settings) -> list[Object]:
    """Only the gateway is reachable from outside: Ray's ports, and the engines', are for its own pods and KubeRay.

    What runs in a pod reaches the others, names, and the ports that the settings name.
    """
    mine = {"podSelector": {"matchLabels": pod.labels()}}
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    return [
        _policy("synthia-among-its-pods", {"matchLabels": pod.labels()}, ingress=[{"from": [mine]}]),
        _policy(
            "synthia-gateway",
            {"matchLabels": pod.labels()},
            ingress=[{"ports": [{"protocol": "TCP", "port": settings.port}]}],
        ),
        _policy(
            "synthia-operator",
            {"matchLabels": pod.labels()},
            ingress=[{"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]}],
        ),
        _egress(settings, mine),
    ]


def disruption_budget(component: str, rule: dict[str, int]) -> Object:
    """How many of these pods may be evicted at once, by `maxUnavailable` or `minAvailable`."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": pod.meta(f"synthia-{component}", component),
        "spec": {**rule, "selector": {"matchLabels": pod.labels(component)}},
    }


def service_monitor(settings: Settings) -> Object:
    """Prometheus Operator's scrape; /metrics wants an admin's key."""
    key = {"type": "Bearer", "credentials": {"name": ADMIN_KEY_SECRET, "key": "key"}}
    # On Ray the series say which replica they are of; here each pod is one.
    by_pod = {"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "replica", "action": "replace"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": _found_by_prometheus(settings),
        "spec": {
            "jobLabel": "app.kubernetes.io/name",  # `synthia`: what the rules ask for, not the Service's own name
            "selector": {"matchLabels": pod.labels("metrics")},
            "endpoints": [
                {
                    "port": "http",
                    "path": "/metrics",
                    "interval": "15s",
                    "scrapeTimeout": "5s",
                    "authorization": key,
                    **({"relabelings": [by_pod]} if settings.deploy.keda else {}),
                }
            ],
        },
    }


def prometheus_rule(settings: Settings) -> Object:
    """The rules of `deploy/prometheus`, all of them."""
    groups = [group for text in rules(settings).values() for group in yaml.safe_load(text)["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": _found_by_prometheus(settings),
        "spec": {"groups": groups},
    }


def dashboards() -> list[Object]:
    """The dashboards of `deploy/grafana`, where the sidecar of Grafana's chart looks for such."""
    meta = {name.rpartition("/")[2]: text for name, text in shipped("grafana/dashboards").items()}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": pod.meta(f"{name.removesuffix('.json')}-dashboard")
            | {"labels": pod.labels() | {"grafana_dashboard": "1"}},
            "data": {name: text},
        }
        for name, text in meta.items()
        if name.endswith(".json")
    ]


def model_volume(settings: Settings, sizing: Sizing) -> Object:
    """Twice the weights, so that the next version can be fetched beside this one. Read by pods of many nodes."""
    weights = (sizing.geometry.weight_bytes if sizing.geometry else None) or 50 * GIB
    named = settings.deploy.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": pod.meta(pod.MODEL_CLAIM, "model"),
        "spec": {
            "accessModes": ["ReadWriteMany"],
            **({"storageClassName": named} if named else {}),
            "resources": {"requests": {"storage": f"{math.ceil(2 * weights / GIB)}Gi"}},
        },
    }


def model_job(settings: Settings, sizing: Sizing) -> Object:
    """Fetches the model once; each file's SHA-256 is compared with what the hub says of that revision.

    A Job's template can't be changed: what another image or model makes of it has another name.
    """
    command = ["synthia-vllm", "deploy", "fetch-model", sizing.model, "--to", pod.model_folder(settings, sizing)]
    small = {"cpu": "1", "memory": "2Gi"}
    mounts = [
        {"name": "models", "mountPath": pod.MODELS_FOLDER},
        {"name": "data", "mountPath": "/data"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    template = {
        "metadata": {"labels": pod.labels("model")},
        "spec": {
            "restartPolicy": "OnFailure",
            "automountServiceAccountToken": False,
            "securityContext": pod.pod_security(),
            **pod.all_pods(settings),
            "containers": [
                {
                    "name": "fetch",
                    "image": image(settings, sizing.flavour),
                    "command": [*command, "--revision", settings.deploy.model_revision],
                    "securityContext": pod.container_security(),
                    "resources": {"requests": small, "limits": dict(small)},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": [
                {"name": "models", "persistentVolumeClaim": {"claimName": pod.MODEL_CLAIM}},
                {"name": "data", "emptyDir": {}},
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }
    version = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": pod.meta(f"synthia-model-{version}", "model"),
        "spec": {"backoffLimit": 4, "ttlSecondsAfterFinished": _JOB_KEPT_S, "template": template},
    }


def _found_by_prometheus(settings: Settings) -> Object:
    """A Prometheus Operator takes what has the labels that its Prometheus selects."""
    meta = pod.meta(pod.NAME)
    return meta | {"labels": meta["labels"] | settings.deploy.monitor_labels}


def admin_policy(settings: Settings) -> Object:
    """Prometheus is a pod of this cluster, wherever it runs; nobody outside of it gets to keys and metrics."""
    port = {"protocol": "TCP", "port": admin_port(settings)}
    selector = {"matchLabels": pod.labels("engine")}
    return _policy("synthia-admin", selector, ingress=[{"from": [{"namespaceSelector": {}}], "ports": [port]}])


def _egress(settings: Settings, mine: Object) -> Object:
    names = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    outside = [{"protocol": "TCP", "port": port} for port in settings.deploy.egress_ports]
    rules: list[Object] = [{"to": [mine]}, {"ports": names}, *([{"ports": outside}] if outside else [])]
    return _policy("synthia-egress", {"matchLabels": pod.labels()}, egress=rules)


def _policy(name: str, selector: Object, **rules: list[Object]) -> Object:
    """One by its rules: `ingress` or `egress`."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": pod.meta(name),
        "spec": {"podSelector": selector, "policyTypes": [kind.capitalize() for kind in rules], **rules},
    }
