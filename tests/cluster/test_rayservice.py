"""The Serve config inside of the RayService manifest, deployed on the real cluster of this folder."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from deploy.generate import FOLDER
from synthia_vllm.cluster.local import LocalRay
from synthia_vllm.cluster.rest import ServeApi
from tests.ray_cluster import ENGINE_OPTIONS, RunningCluster
from tests.running import new_key, until

pytestmark = pytest.mark.e2e
_CHAT = {"model": "synthia", "messages": [{"role": "user", "content": "What is an orca?"}], "max_tokens": 8}


@pytest.fixture
def deployed(cluster: RunningCluster) -> Iterator[ServeApi]:
    """The manifest's config is what runs; the other tests find their own again after it.

    Its engines are those that run already (the preset's options are the cluster's, but for the nodes that it waits
    for), so none starts for this; its gateway is another. Where Serve listens can't be changed while it runs, so that
    is left as it is.
    """
    manifest = yaml.safe_load((FOLDER / "kubernetes" / "overlays" / "demo-cpu" / "rayservice.yaml").read_text())
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (engine,) = [one for one in config["applications"] if one["name"] == "engine"]
    assert engine["args"]["settings"].pop("cluster") == {"accelerator": "cpu"}
    (gateway,) = [one for one in config["applications"] if one["name"] == "gateway"]
    assert gateway["args"]["settings"].pop("cluster") == {"gateway_nodes": {"ray.io/node-group": "engines"}}
    ray = LocalRay(**cluster.state())
    api = ServeApi(ray.dashboard, ray.token)
    config["http_options"] = api.details()["http_options"]
    try:
        api.deploy(config)
        until(lambda: _asks_for_keys(cluster.url), "the manifest's gateway serves", 120, pause=1)
        until(cluster.healthy, "its applications are whole", 300, pause=2)
        yield api
    finally:
        done = cluster.run("up", "--replicas", "2", *ENGINE_OPTIONS)
        assert done.returncode == 0, done.stderr


def _asks_for_keys(url: str) -> bool:
    return httpx.get(f"{url}/v1/models", timeout=30).status_code == 401


def test_the_manifests_applications_answer(cluster: RunningCluster, deployed: ServeApi) -> None:
    key = {"Authorization": f"Bearer {new_key(cluster.data.parent, 'rayservice')}"}
    with httpx.Client(base_url=cluster.url, headers=key, timeout=120) as client:
        assert client.get("/ready").status_code == 200
        reply = client.post("/v1/chat/completions", json=_CHAT)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] > 0
