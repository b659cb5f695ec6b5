"""A cluster at rest, with no engine at all, and the request that wakes it. The last file here: it leaves it so."""

import httpx
import pytest

from tests.ray_cluster import ENGINE_OPTIONS, RunningCluster
from tests.running import until

pytestmark = pytest.mark.e2e
_AT_REST = ("--scaling.min-replicas", "0", "--scaling.max-replicas", "1", "--scaling.downscale-delay-s", "1")
_CHAT = {"model": "synthia", "messages": [{"role": "user", "content": "What is an orca?"}], "max_tokens": 8}


def test_a_cluster_without_engines_is_ready_and_the_first_request_starts_one(cluster: RunningCluster) -> None:
    def engines() -> list[str]:
        return [replica["state"] for replica in cluster.status()["applications"]["engine"]["replicas"]]

    done = cluster.run("up", "--replicas", "0", *_AT_REST, *ENGINE_OPTIONS)
    assert done.returncode == 0, done.stderr
    until(lambda: not engines(), "no engine is left", 300, pause=2)
    assert httpx.get(f"{cluster.url}/ready", timeout=30).status_code == 200
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=_CHAT, timeout=600)
    assert reply.status_code == 200, reply.text
