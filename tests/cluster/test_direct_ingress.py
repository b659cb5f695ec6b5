"""What a Serve replica does with more requests than it takes at once: shown by an application of the tests' own."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from synthia_vllm.cluster.local import LocalRay
from synthia_vllm.cluster.rest import ServeApi
from tests.ray_cluster import RunningCluster
from tests.running import until

pytestmark = pytest.mark.e2e
_NAME = "slow"
_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def replica(cluster: RunningCluster) -> Iterator[str]:
    """The URL of the only replica of `slow_app`, on the port that is its own. The cluster's applications stay."""
    ray = LocalRay(**cluster.state())
    api = ServeApi(ray.dashboard, ray.token)
    details = api.details()
    others = [one["deployed_app_config"] for one in details["applications"].values()]
    slow = {
        "name": _NAME,
        "route_prefix": f"/{_NAME}",
        "import_path": "tests.cluster.slow_app:app",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(_REPOSITORY)}},
    }
    same = {name: details[name] for name in ("proxy_location", "http_options")}
    try:
        api.deploy({**same, "applications": [*others, slow]})
        until(lambda: _state(api) == "RUNNING", "it runs", 120, pause=1)
        yield f"http://127.0.0.1:{_port(api)}/{_NAME}"
    finally:
        api.deploy({**same, "applications": others})
        until(lambda: _state(api) is None, "it is gone", 120, pause=1)


def test_what_is_more_waits_and_is_answered(cluster: RunningCluster, replica: str) -> None:
    def ask() -> tuple[int, str]:
        reply = httpx.get(replica, params={"seconds": 2}, timeout=60)
        return reply.status_code, reply.text

    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask) for _ in range(3)]
        time.sleep(1)
        health = httpx.get(replica.replace(f"/{_NAME}", "/-/healthz"), timeout=30)
        assert not any(one.done() for one in asked), "Serve's own question is answered while all of them wait"
        assert health.status_code == 200
        assert [one.result() for one in asked] == [(200, "1")] * 3, "one at a time, and none was refused"
    assert cluster.healthy()


def _state(api: ServeApi) -> str | None:
    found: str | None = api.details()["applications"].get(_NAME, {}).get("status")
    return found


def _port(api: ServeApi) -> int:
    """Of the only replica, where HAProxy and our gateways would ask it."""
    (deployment,) = api.details()["applications"][_NAME]["deployments"].values()
    (replica,) = deployment["replicas"]
    (port,) = {
        connection.laddr.port
        for connection in psutil.Process(replica["pid"]).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and 30000 <= connection.laddr.port < 31000
    }
    found: int = port
    return found
