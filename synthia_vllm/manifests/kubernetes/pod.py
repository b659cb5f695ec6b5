"""What every pod of ours has: a user without rights, a root file system that can't be written, secrets as files."""

import re
from typing import Any

from synthia_vllm.errors import SetupError
from synthia_vllm.manifests.common import image
from synthia_vllm.manifests.sizing import Sizing
from synthia_vllm.settings import SECRETS_VARIABLE, Settings

NAME = "synthia"
SECRET = "synthia-secrets"
MODEL_CLAIM = "synthia-model"
USER = 10001  # the Dockerfile's
SECRETS_FOLDER, MODELS_FOLDER = "/run/secrets/synthia", "/models"

Object = dict[str, Any]


# Pods that clients are sent to, once they are ready.
TAKES_CLIENTS = {"synthia-vllm/takes-clients": "true"}


def meta(name: str, component: str | None = None, **more: Any) -> Object:
    return {"name": name, "labels": labels(component), **more}


def labels(component: str | None = None) -> Object:
    own = {"app.kubernetes.io/name": NAME}
    return own | ({"app.kubernetes.io/component": component} if component else {})


def model_folder(settings: Settings, sizing: Sizing) -> str:
    """Where pods find the model: what the image has, a folder, or the volume that the Job fills."""
    if not is_fetched(sizing):
        return sizing.model
    # Each commit has a folder of its own: what is served is never written, and another one is a rollout.
    revision = settings.deploy.model_revision
    commit = f"-{revision[:12]}" if re.fullmatch("[0-9a-f]{7,40}", revision) else ""
    return f"{MODELS_FOLDER}/{sizing.model.rpartition('/')[2]}{commit}"


def needs_volume(sizing: Sizing) -> bool:
    return sizing.model != "demo"


def is_fetched(sizing: Sizing) -> bool:
    """Whether the Job brings the model from the hub."""
    return needs_volume(sizing) and not sizing.model.startswith("/")


def pod_security() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def volumes(sizing: Sizing, *, secrets: bool = True) -> list[Object]:
    found: list[Object] = [
        {"name": "data", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    if secrets:
        found.append({"name": "secrets", "secret": {"secretName": SECRET, "defaultMode": 0o440}})
    if needs_volume(sizing):
        claim = {"claimName": MODEL_CLAIM, "readOnly": True}
        found.append({"name": "models", "persistentVolumeClaim": claim})
    return found


def mounts(sizing: Sizing) -> list[Object]:
    found: list[Object] = [
        {"name": "data", "mountPath": "/data"},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "secrets", "mountPath": SECRETS_FOLDER, "readOnly": True},
    ]
    if needs_volume(sizing):
        found.append({"name": "models", "mountPath": MODELS_FOLDER, "readOnly": True})
    return found


def environment(variables: dict[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in ({SECRETS_VARIABLE: SECRETS_FOLDER} | variables).items()]


def resources(settings: Settings, sizing: Sizing) -> Object:
    """A pod that engines run in has what its node leaves; requests are limits, so that it is the last to be evicted."""
    deploy = settings.deploy
    if deploy.reserved_cpus >= deploy.cpus_per_node:
        raise SetupError(
            f"--deploy.reserved-cpus {deploy.reserved_cpus:g} does not fit --deploy.cpus-per-node "
            f"{deploy.cpus_per_node}: nothing would be left for engines; lower the first"
        )
    cpus = round(1000 * (deploy.cpus_per_node - deploy.reserved_cpus))
    each = {"cpu": f"{cpus}m", "memory": f"{int(deploy.memory_per_node_gib * 1024)}Mi"}
    if sizing.gpus:
        each["nvidia.com/gpu"] = str(deploy.gpus_per_node)
    return {"requests": each, "limits": dict(each)}


def all_pods(settings: Settings) -> Object:
    """What the pods of every kind are told of their cluster."""
    deploy = settings.deploy
    told: Object = {}
    if deploy.pull_secrets:
        told["imagePullSecrets"] = [{"name": name} for name in deploy.pull_secrets]
    if deploy.priority_class:
        told["priorityClassName"] = deploy.priority_class
    return told


def engine_pods(settings: Settings, sizing: Sizing) -> Object:
    """And those that engines run in: which nodes they go to."""
    deploy = settings.deploy
    told = all_pods(settings)
    if deploy.node_selector:
        told["nodeSelector"] = dict(deploy.node_selector)
    # Clouds taint the nodes that have GPUs with this one.
    taints = [*(["nvidia.com/gpu:NoSchedule"] if sizing.gpus else []), *deploy.tolerations]
    if taints:
        told["tolerations"] = [_toleration(taint) for taint in dict.fromkeys(taints)]
    if deploy.runtime_class:
        told["runtimeClassName"] = deploy.runtime_class
    return told


def model_is_there(settings: Settings, sizing: Sizing) -> Object:
    """Nothing starts before the Job is through, whichever of them Kubernetes has begun first."""
    if not is_fetched(sizing):
        return {}
    small = {"cpu": "100m", "memory": "256Mi"}
    wait = {
        "name": "model",
        "image": image(settings, sizing.flavour),
        "imagePullPolicy": "IfNotPresent",
        "command": ["synthia-vllm", "deploy", "await-model", model_folder(settings, sizing)],
        "securityContext": container_security(),
        "resources": {"requests": small, "limits": dict(small)},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS_FOLDER, "readOnly": True},
            {"name": "data", "mountPath": "/data"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    return {"initContainers": [wait]}


def _toleration(taint: str) -> Object:
    """As `kubectl taint` writes it."""
    key, _, effect = taint.rpartition(":")
    name, equals, value = key.partition("=")
    matching = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": name, **matching, "effect": effect}


def spread(selector: Object) -> list[Object]:
    """Over zones and nodes, as well as can be: one that can't be spread is better than none."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector},
        }
        for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
    ]


def http_probe(path: str, port: int | str, *, period: int, failures: int, timeout: int = 5) -> Object:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def drain_hook(settings: Settings, seconds: float) -> Object:
    """Before SIGTERM: no new connections come (readiness is gone), and those that are open may finish."""
    command = ["synthia-vllm", "deploy", "drain", "--port", str(settings.port), "--seconds", f"{seconds:g}"]
    return {"preStop": {"exec": {"command": command}}}
