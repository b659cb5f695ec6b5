"""What every pod of ours has: a user without rights, a root file system that can't be written, secrets as files."""

from typing import Any

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


def model_folder(sizing: Sizing) -> str:
    """Where pods find the model: what the image has, a folder, or the volume that the Job fills."""
    if sizing.model == "demo" or sizing.model.startswith("/"):
        return sizing.model
    return f"{MODELS_FOLDER}/{sizing.model.rpartition('/')[2]}"


def needs_volume(sizing: Sizing) -> bool:
    return sizing.model != "demo"


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
    """A pod that engines run in has what its node gives; requests are limits, so that it is the last to be evicted."""
    deploy = settings.deploy
    memory = f"{int(deploy.memory_per_node_gib * 1024)}Mi"
    each = {"cpu": str(deploy.cpus_per_node), "memory": memory}
    if sizing.gpus:
        each["nvidia.com/gpu"] = str(deploy.gpus_per_node)
    return {"requests": each, "limits": dict(each)}


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
