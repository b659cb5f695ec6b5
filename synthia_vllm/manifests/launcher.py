"""Ray's cluster launcher (`ray up`): machines of your own, and AWS; with the Serve config to deploy there."""

import shlex
from typing import Any

from synthia_vllm.cluster.config import ray_environment
from synthia_vllm.manifests.common import image, in_cluster
from synthia_vllm.manifests.files import Files, to_yaml
from synthia_vllm.manifests.sizing import Sizing, size
from synthia_vllm.settings import Settings

_ENVIRONMENT_FILE = "/run/synthia/ray.env"  # in the container, which Ray mounts its files into
_GCS_PASSWORD_FILE = "/etc/synthia/secrets/gcs_redis"  # none where Redis asks for none
_CLUSTER = "synthia"
_PORT = 6379
_NAMES = ("ray-head.example.com", "ray-worker-1.example.com")  # where no workers are named
Object = dict[str, Any]


def render_launcher(settings: Settings, vllm_options: list[str]) -> Files:
    """Raises SetupError for settings that contradict one another or do not fit what `deploy` says of the machines."""
    from synthia_vllm.cli.cluster import config_text

    sizing = size(settings)
    told = in_cluster(settings, model=sizing.model, gpus=sizing.gpus)
    return {
        "ray/on-premises.yaml": to_yaml(_on_premises(settings, sizing), comment="ray up on-premises.yaml"),
        "ray/aws.yaml": to_yaml(_aws(settings, sizing), comment="ray up aws.yaml"),
        "ray/ray.env": _environment_file(settings),
        "ray/serve.yaml": config_text(told, vllm_options) + "\n",
    }


def _on_premises(settings: Settings, sizing: Sizing) -> Object:
    head, *workers = settings.deploy.workers or _NAMES
    return {
        "cluster_name": _CLUSTER,
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "auth": {"ssh_user": "synthia", "ssh_private_key": "~/.ssh/id_ed25519"},
        "max_workers": len(workers),
        **_shared(settings, sizing, cpus=settings.deploy.cpus_per_node),
    }


def _aws(settings: Settings, sizing: Sizing) -> Object:
    """Engines on `deploy.instance_type`, the head on a small machine of its own; Ray starts and ends the machines."""
    scaling = settings.scaling.max_replicas is not None
    nodes = settings.deploy.nodes
    resources: dict[str, int] = {"CPU": settings.deploy.cpus_per_node}
    if sizing.gpus:
        resources["GPU"] = settings.deploy.gpus_per_node
    return {
        "cluster_name": _CLUSTER,
        "provider": {"type": "aws", "region": "us-east-1", "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "max_workers": nodes,
        "idle_timeout_minutes": max(1, round(settings.scaling.downscale_delay_s / 60)),
        "available_node_types": {
            "head": {"node_config": {"InstanceType": "m7i.xlarge"}, "resources": {"CPU": 0}},
            "engine": {
                "node_config": {"InstanceType": settings.deploy.instance_type},
                "resources": resources,
                "min_workers": min(settings.scaling.min_replicas, nodes) if scaling else nodes,
                "max_workers": nodes,
            },
        },
        "head_node_type": "head",
        **_shared(settings, sizing, cpus=0),
    }


def _shared(settings: Settings, sizing: Sizing, *, cpus: int) -> Object:
    """Ray in our image on each machine, with the environment that replicas need, and secrets from a folder there.

    Ray's ports ask for the token in /etc/synthia/secrets/ray_token: whoever can write to them can run code.
    """
    # Ray starts a shell in the container and Ray from it; the image's own entry would take that for an option.
    options = ["--entrypoint=/usr/bin/tini", "--ulimit=nofile=65536:65536", "--shm-size=2g"]
    options += ["--volume=/etc/synthia/secrets:/etc/synthia/secrets:ro", "--volume=/var/lib/synthia:/data"]
    if not sizing.model.startswith("/"):
        options.append("--env=HF_HOME=/data/hub")
    else:
        options.append(f"--volume={sizing.model}:{sizing.model}:ro")
    load = f"set -a; . {_ENVIRONMENT_FILE}; set +a"
    return {
        "docker": {
            "image": image(settings, sizing.flavour),
            "container_name": "synthia",
            "pull_before_run": True,
            "run_options": options + (["--gpus=all"] if sizing.gpus else []),
        },
        "file_mounts": {_ENVIRONMENT_FILE: "./ray.env"},
        "head_start_ray_commands": [
            "ray stop",
            f"{load}; {_redis(settings)}ray start --head --port={_PORT} --num-cpus={cpus} --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml --disable-usage-stats"
            + (f' --redis-password="$(cat {_GCS_PASSWORD_FILE} 2>/dev/null)"' if settings.deploy.gcs_redis else ""),
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{load}; ray start --address=$RAY_HEAD_IP:{_PORT} --disable-usage-stats",
        ],
    }


def _redis(settings: Settings) -> str:
    """What the head alone is told, so that one that is lost comes back to its cluster: `ray up` again."""
    redis = settings.deploy.gcs_redis
    return f"RAY_REDIS_ADDRESS={redis} RAY_external_storage_namespace={_CLUSTER} " if redis else ""


def _environment_file(settings: Settings) -> str:
    """Sourced by the shell that starts Ray on each node."""
    variables = {
        **ray_environment(settings),
        "SYNTHIA_SECRETS": "/etc/synthia/secrets",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/etc/synthia/secrets/ray_token",
    }
    head = (
        "# The environment of every node of Ray, by `synthia-vllm deploy render ray`. Secrets are in SYNTHIA_SECRETS.\n"
    )
    return head + "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
