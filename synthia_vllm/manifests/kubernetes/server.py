"""Kubernetes without Ray: each pod is a whole server, `synthia-vllm serve`, and KEDA decides how many there are."""

import hashlib
import json

from synthia_vllm.manifests.common import OF_SEVERAL, image, settings_file
from synthia_vllm.manifests.files import to_yaml
from synthia_vllm.manifests.kubernetes import base, pod
from synthia_vllm.manifests.kubernetes.pod import Object
from synthia_vllm.manifests.kubernetes.rayservice import in_pod
from synthia_vllm.manifests.sizing import Sizing
from synthia_vllm.settings import CONFIG_VARIABLE, Settings

CONFIG = "synthia-config"
_START_S = 1800
_REQUESTS_PER_REPLICA = 64  # in flight and queued: about what an engine batches well before anybody waits
_DEREGISTRATION_S = 10  # until every balancer has heard that the pod takes no more


def config_map(settings: Settings, sizing: Sizing) -> Object:
    """The settings of all pods; secrets are not among them."""
    told = settings_for_pods(settings, sizing)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": pod.meta(CONFIG),
        "data": {"settings.yaml": to_yaml(told)},
    }


def _checksum(settings: Settings, sizing: Sizing) -> Object:
    """Pods read their settings when they start: others have to be another template, or none would roll."""
    text = json.dumps(config_map(settings, sizing)["data"], sort_keys=True)
    return {"checksum/config": hashlib.sha256(text.encode()).hexdigest()}


def settings_for_pods(settings: Settings, sizing: Sizing) -> Object:
    told = settings_file(in_pod(settings, sizing), without=OF_SEVERAL)
    # At every address of the pod, but no Service for clients leads there.
    return told | {"log_file": "-", "admin_port": base.admin_port(settings), "admin_host": "0.0.0.0"}


def deployment(settings: Settings, sizing: Sizing, vllm_options: list[str]) -> Object:
    labels = pod.labels("engine")
    options = ["--", *vllm_options] if vllm_options else []
    container = {
        "name": "server",
        "image": image(settings, sizing.flavour),
        "imagePullPolicy": "IfNotPresent",
        "args": ["serve", *options],
        "env": pod.environment({CONFIG_VARIABLE: "/etc/synthia/settings.yaml", "HF_HUB_OFFLINE": "1"}),
        "ports": [
            {"name": "http", "containerPort": settings.port},
            {"name": "admin", "containerPort": base.admin_port(settings)},
        ],
        "resources": pod.resources(settings, sizing),
        "securityContext": pod.container_security(),
        "startupProbe": pod.http_probe("/health", "http", period=5, failures=_START_S // 5),
        "readinessProbe": pod.http_probe("/ready", "http", period=5, failures=3, timeout=10),
        "livenessProbe": pod.http_probe("/health", "http", period=10, failures=6),
        # SIGTERM drains by itself; before it, balancers hear that the pod goes.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_DEREGISTRATION_S)]}}},
        "volumeMounts": [*pod.mounts(sizing), {"name": "config", "mountPath": "/etc/synthia", "readOnly": True}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": pod.meta(pod.NAME),
        "spec": {
            "selector": {"matchLabels": labels},
            "progressDeadlineSeconds": _START_S + 60,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling(settings)},
            "template": {
                "metadata": {
                    "labels": labels | pod.TAKES_CLIENTS,
                    "annotations": _checksum(settings, sizing),
                },
                "spec": {
                    "serviceAccountName": pod.NAME,
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": sizing.grace_s + _DEREGISTRATION_S,
                    "securityContext": pod.pod_security(),
                    **pod.engine_pods(settings, sizing),
                    "topologySpreadConstraints": pod.spread(labels),
                    **pod.model_is_there(settings, sizing),
                    "containers": [container],
                    "volumes": [*pod.volumes(sizing), {"name": "config", "configMap": {"name": CONFIG}}],
                },
            },
        },
    }


def scaled_object(settings: Settings) -> Object:
    """By requests in flight and queued, as Prometheus has them; without Prometheus the number stays as it was."""
    cluster, scaling = settings.cluster, settings.scaling
    most = scaling.max_replicas or max(cluster.replicas, settings.deploy.nodes)
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": pod.meta(pod.NAME),
        "spec": {
            "scaleTargetRef": {"name": pod.NAME},
            "minReplicaCount": max(scaling.min_replicas, 1),
            "maxReplicaCount": most,
            "pollingInterval": 15,
            # An outage of Prometheus scales nothing down, and up to those that were meant to start with.
            "fallback": {
                "failureThreshold": 4,
                "replicas": max(cluster.replicas, 1),
                "behavior": "currentReplicasIfHigher",
            },
            # Not `cooldownPeriod`, which is about the way to zero alone.
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {"scaleDown": {"stabilizationWindowSeconds": int(scaling.downscale_delay_s)}}
                }
            },
            "triggers": [
                {
                    "type": "prometheus",
                    "metadata": {
                        "serverAddress": settings.deploy.prometheus,
                        "query": (
                            f'sum(synthia_requests_in_flight{{namespace="{settings.deploy.namespace}"}}) + '
                            f'sum(synthia_requests_queued{{namespace="{settings.deploy.namespace}"}})'
                        ),
                        "threshold": str(int(_REQUESTS_PER_REPLICA * scaling.target_load)),
                    },
                }
            ],
        },
    }


def _rolling(settings: Settings) -> Object:
    return {"maxSurge": 1, "maxUnavailable": 0} if settings.cluster.surge else {"maxSurge": 0, "maxUnavailable": 1}
