"""Ray's cluster launcher: its own schema, and the environment that nodes need."""

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.generate import FOLDER
from synthia_vllm.cluster.config import check_environment, ray_environment
from synthia_vllm.manifests.render import render
from synthia_vllm.settings import DeploySettings, Settings, load_settings

_RAY = FOLDER / "ray"


@pytest.mark.parametrize("name", ["on-premises.yaml", "aws.yaml"])
def test_ray_accepts_the_cluster(name: str) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((_RAY / name).read_text()), schema)


@pytest.mark.parametrize("name", ["on-premises.yaml", "aws.yaml"])
def test_the_cloud_fills_in_the_rest(name: str) -> None:
    """What `ray up` does before it asks the cloud for anything."""
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config: dict[str, Any] = yaml.safe_load((_RAY / name).read_text())
    filled = fillout_defaults(config)
    validate_config(filled)


def test_a_shell_reads_the_environment_that_replicas_ask_for() -> None:
    settings = load_settings(["--config", str(_RAY / "example.yaml")])
    words = ["sh", "-c", f"set -a; . {_RAY / 'ray.env'}; env -0"]
    told = subprocess.run(words, capture_output=True, text=True, check=True, env={}).stdout
    found = dict(line.split("=", 1) for line in told.split("\0") if "=" in line)
    assert {name: found[name] for name in ray_environment(settings)} == ray_environment(settings)
    check_environment(settings, found)


def test_serve_accepts_the_applications() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((_RAY / "serve.yaml").read_text()))


@pytest.mark.parametrize("name", ["on-premises", "aws"])
def test_only_the_head_is_told_of_redis(name: str) -> None:
    """`ray start` takes its password from nowhere but its command line; in the file there is only where it lies."""
    settings = Settings(model="demo", deploy=DeploySettings(gcs_redis="redis:6379"))
    cluster = yaml.safe_load(render("ray", settings, [])[f"ray/{name}.yaml"])
    head, worker = (" ".join(cluster[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "RAY_REDIS_ADDRESS=redis:6379 " in head
    assert '--redis-password="$(cat /etc/synthia/secrets/gcs_redis 2>/dev/null)"' in head
    assert "redis" not in worker
