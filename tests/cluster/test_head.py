"""Ray's head is lost: two real nodes on this machine, a Redis, and a light application on the one that stays."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import pytest

from synthia_vllm.cluster.config import ray_environment
from synthia_vllm.cluster.rest import ServeApi
from synthia_vllm.errors import SetupError
from synthia_vllm.free_ports import free_ports
from synthia_vllm.manifests.kubernetes.rayservice import TO_THE_CONTAINERS_OUTPUT
from synthia_vllm.settings import DeploySettings, Settings
from tests.redis_service import RedisServer
from tests.running import kill_all, until

pytestmark = pytest.mark.e2e
_REPOSITORY = Path(__file__).parents[2]
_MARK = "SYNTHIA_TEST_NODE"
# Ray takes two nodes of one machine for one cluster that runs already.
_START = "import ray._private.services as s; s.find_gcs_addresses = set; from ray.scripts.scripts import main; main()"
_APPLICATION = {"name": "slow", "route_prefix": "/", "import_path": "tests.cluster.waiting_app:app"}


class Nodes:
    """Two Ray nodes, `head` and `staying`, whose processes are known by their environment.

    redis   keeps what the head knows; without one it forgets all when it ends
    """

    def __init__(self, folder: Path, redis: RedisServer | None) -> None:
        self._folder = folder
        self._redis = redis
        self.port, self._gcs, self._dashboard, *self._others = free_ports(16)
        self.api = ServeApi(f"127.0.0.1:{self._dashboard}")

    def start_head(self) -> None:
        ports = {"": self._gcs, "dashboard-": self._dashboard, "ray-client-server-": self._others[10]}
        words = [f"--{name}port={port}" for name, port in ports.items()]
        self._start("head", 0, "--head", "--num-cpus=0", f"--temp-dir={self._folder / 'r'}", *words)

    def start_staying(self) -> None:
        self._start("staying", 1, f"--address=127.0.0.1:{self._gcs}", "--num-cpus=1")

    def processes(self, node: str) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _environment(process).get(_MARK) == self._mark(node)]

    def kill(self, node: str) -> None:
        """Those too that others start meanwhile: a HAProxy that outlives its node keeps the ports."""
        while left := self.processes(node):
            kill_all(left)

    def output(self, node: str) -> Path:
        """What the node's processes have said: in a pod, the container's output."""
        return self._folder / f"{node}.txt"

    def deploy(self, **arguments: str) -> None:
        applications = [{**_APPLICATION, "args": arguments}]
        self.api.deploy({"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": applications})

    def replicas(self) -> list[int]:
        """Process ids of the application's replicas that run; none while nobody tells."""
        try:
            application: dict[str, Any] = self.api.details()["applications"]["slow"]
        except (SetupError, KeyError):
            return []
        found = [replica for one in application["deployments"].values() for replica in one["replicas"]]
        return [replica["pid"] for replica in found if replica["state"] == "RUNNING"]

    def answers(self) -> bool:
        return httpx.get(f"http://127.0.0.1:{self.port}/", params={"seconds": 0}, timeout=5).status_code == 200

    def _mark(self, node: str) -> str:
        return f"{self._folder}/{node}"

    def _start(self, node: str, number: int, *words: str) -> None:
        folder = self._folder / node
        folder.mkdir(exist_ok=True)
        ports = self._others[4 * number : 4 * number + 4]
        names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")
        redis = f"127.0.0.1:{self._redis.port}" if self._redis else None
        settings = Settings(model="demo", deploy=DeploySettings(gcs_redis=redis))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SYNTHIA_"))},
            **ray_environment(settings),
            **TO_THE_CONTAINERS_OUTPUT,  # as in a pod
            "RAY_AUTH_MODE": "disabled",  # else by whether this user has a token of another cluster
            _MARK: self._mark(node),
            **({"RAY_NODE_TYPE_NAME": "engines"} if node == "staying" else {}),  # as in a pod of that group
            "PYTHONPATH": str(_REPOSITORY),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # several nodes on the loopback address
            # A node that nobody keeps anything for ends when its head was away for so long; Ray waits for a minute.
            **({} if redis else {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}),
            **({"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": folder.parent.name} if redis else {}),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            **{f"RAY_SERVE_{name}": str(port) for name, port in zip(names, ports, strict=True)},
        }
        command = [
            sys.executable,
            "-c",
            _START,
            "start",
            "--node-ip-address=127.0.0.1",
            "--disable-usage-stats",
            *words,
        ]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={80 * 2**20}"]
        command += [f"--dashboard-agent-listen-port={self._others[8 + number]}", "--include-log-monitor=false"]
        with self.output(node).open("a") as output:
            done = subprocess.run(
                command, env=environment, stdout=output, stderr=output, timeout=120, check=False, start_new_session=True
            )
        assert done.returncode == 0, self.output(node).read_text()


@pytest.fixture
def nodes(redis_server: RedisServer, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """None started yet. With a Redis; without one for a test that is marked so by its parameter."""
    durable = getattr(request, "param", True)
    with TemporaryDirectory(prefix="synthia-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # Ray wants it short
        found = Nodes(Path(folder), redis_server if durable else None)
        try:
            yield found
        finally:
            found.kill("staying")
            found.kill("head")


def test_a_head_that_is_lost_finds_its_replicas_again(nodes: Nodes) -> None:
    """KubeRay deploys when no more than the head is up, which has no CPUs to give: engines wait for a node that has."""
    nodes.start_head()
    nodes.deploy(accelerator="cpu")
    until(lambda: "waiting for a node with a CPU" in nodes.output("head").read_text(), "it waits for a node", 180)
    assert nodes.replicas() == []
    nodes.start_staying()
    pid = _replica(nodes)
    until(lambda: "asked for 0 s" in nodes.output("staying").read_text(), "what a replica logs is told by its node")
    nodes.kill("head")
    assert _serves(pid), "its node has nobody to ask, and needs nobody"
    nodes.start_head()
    until(nodes.answers, "HAProxy lets clients in again", 120, pause=1)
    until(lambda: nodes.replicas() == [pid], "the controller has found the same replica", 60, pause=1)


@pytest.mark.parametrize("nodes", [False], indirect=True)
def test_a_head_that_is_lost_without_redis_takes_all_with_it(nodes: Nodes) -> None:
    nodes.start_head()
    nodes.start_staying()
    nodes.deploy()
    pid = _replica(nodes)
    nodes.kill("head")
    until(lambda: not nodes.processes("staying"), "the other node has ended itself, its replica too", 150, pause=1)
    until(lambda: _has_ended(pid), "its replica has ended", 60, pause=1)
    nodes.start_head()
    assert nodes.replicas() == [], "it knows of nothing"
    nodes.start_staying()
    nodes.deploy()
    assert _replica(nodes) != pid


def _replica(nodes: Nodes) -> int:
    """The process of its one replica, which answers."""
    until(nodes.answers, "the application answers", 120, pause=1)
    (pid,) = nodes.replicas()
    return pid


def _serves(pid: int) -> bool:
    (port,) = {
        one.laddr.port
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and 30000 <= one.laddr.port < 31000
    }
    return httpx.get(f"http://127.0.0.1:{port}/", params={"seconds": 0}, timeout=5).status_code == 200


def _has_ended(pid: int) -> bool:
    """Also where nobody has asked for its exit code yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):
        return {}
