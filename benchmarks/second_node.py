"""A Ray cluster of two nodes on this machine, of which one ends under load: `python -m benchmarks.disruptions`.

The second node runs in a network namespace, with an address of its own at the other end of a pair of interfaces: wants
Linux, root and `ip`. Each node has room for one engine replica. The gateway is placed before the second node is there,
so that it runs on the first one; clients whose gateway ends lose their connections.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

import click
import psutil

from benchmarks.disruption_load import Clients, Request, figures
from synthia_vllm.bench.ray_cluster import up
from synthia_vllm.cluster import local
from synthia_vllm.cluster.config import ENGINE, GATEWAY, ray_environment
from synthia_vllm.cluster.rest import ReplicaStatus, ServeApi, applications
from synthia_vllm.free_ports import free_ports
from synthia_vllm.settings import Settings

_NAMESPACE, _HERE, _THERE = "synthia-node", "synthia0", "synthia1"  # interfaces: 15 characters at most
_FIRST, _SECOND = "10.211.113.1", "10.211.113.2"
_WAIT_S = 180.0
_BEFORE_S, _AFTER_S = 8.0, 20.0
_HAPROXY_PORTS = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")


async def node(say: Callable[[str], None]) -> dict[str, Any]:
    """Ends the second node's raylet with SIGTERM under load. Raises ClickException where there can't be one."""
    if shutil.which("ip") is None or os.geteuid():
        raise click.ClickException("a second node wants `ip` and root")
    with two_nodes() as nodes:
        coming = asyncio.create_task(asyncio.to_thread(nodes.up))
        await nodes.until(GATEWAY, [_FIRST], coming)
        nodes.start_second()
        await coming
        await nodes.until(ENGINE, [_FIRST, _SECOND])
        say("two nodes, a replica on each, the gateway on the first")
        await asyncio.sleep(12)
        asked = [Request(100), Request(100, streamed=True)] * 6
        async with Clients(nodes.url) as clients:
            await clients.at_once(asked)
            undisturbed = figures(await clients.at_once(asked))
            enough = asyncio.Event()
            running = asyncio.create_task(clients.closed_loop(asked, enough))
            await asyncio.sleep(_BEFORE_S)
            nodes.end_second()
            await asyncio.sleep(_AFTER_S)
            enough.set()
            found = figures(await running)
        left = [replica.node for replica in await nodes.replicas(ENGINE)]
    base = undisturbed["slowest_s"]
    say(
        f"raylet ended: {found['failed']} of {found['replies']} failed {found['reasons']}, "
        f"slowest {found['slowest_s']} s, {base} s undisturbed; left on {left}"
    )
    return {**found, "undisturbed_s": base, "times_undisturbed": round(found["slowest_s"] / base, 2), "left on": left}


class Nodes:
    """Two nodes of one Ray; `two_nodes` makes and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._gcs, self._dashboard, client, self._http, self._agent, *self._ports = free_ports(9)
        self.url = f"http://{_FIRST}:{self._http}"
        token = folder / "token"
        token.write_text(token_hex(32))
        self._secrets = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "SYNTHIA_ACCESS__SECRET": token_hex(32),
        }
        self._api = ServeApi(f"{_FIRST}:{self._dashboard}", token.read_text())
        _ray(
            [
                *("--head", f"--port={self._gcs}", f"--node-ip-address={_FIRST}", f"--ray-client-server-port={client}"),
                *(f"--dashboard-host={_FIRST}", f"--dashboard-port={self._dashboard}", f"--temp-dir={folder / 'r'}"),
            ],
            self._environment("first"),
            agent=self._agent,
        )

    def start_second(self) -> None:
        words = [f"--address={_FIRST}:{self._gcs}", f"--node-ip-address={_SECOND}"]
        prefix = ("ip", "netns", "exec", _NAMESPACE)
        _ray(words, self._environment("second"), agent=self._agent, prefix=prefix)

    def end_second(self) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words and words[0].endswith("/raylet") and f"--node_ip_address={_SECOND}" in words:
                    process.send_signal(signal.SIGTERM)
                    return
        raise click.ClickException("the second node has no raylet")

    def up(self) -> None:
        words = ["--address", f"{_FIRST}:{self._dashboard}", "--host", "0.0.0.0", "--port", str(self._http)]
        words += [
            "--model",
            "demo",
            "--replicas",
            "2",
            "--cluster.cpus-per-replica",
            "1",
            "--access.mode",
            "open",
            "--insecure",
        ]
        words += ["--engine.max-model-len", "2048", "--engine.kv-cache-gib", "1", "--engine.dtype", "float32"]
        with _set(self._secrets):
            up(words)

    async def replicas(self, application: str) -> list[ReplicaStatus]:
        found = applications(await asyncio.to_thread(self._api.details))
        return [one for one in found[application].replicas if one.state == "RUNNING"] if application in found else []

    async def until(self, application: str, nodes: Sequence[str], coming: "asyncio.Task[None] | None" = None) -> None:
        """Returns once an application runs on just these nodes. Raises what `coming` raises."""
        async with asyncio.timeout(_WAIT_S):
            while sorted(replica.node for replica in await self.replicas(application)) != sorted(nodes):
                if coming is not None and coming.done():
                    coming.result()
                await asyncio.sleep(1)

    def _environment(self, name: str) -> dict[str, str]:
        files = self.folder / name
        files.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SYNTHIA_"))}
        places = {key: os.environ[key] for key in ("SYNTHIA_DATA", "SYNTHIA_CACHE") if key in os.environ}
        return {
            **kept, **places, **ray_environment(Settings(model="demo")), **self._secrets,
            "SYNTHIA_CLUSTER_FOLDER": str(self.folder),  # by which `local.stop` knows its processes
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "a.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "m.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
            **{f"RAY_SERVE_{key}": str(port) for key, port in zip(_HAPROXY_PORTS, self._ports, strict=True)},
        }  # fmt: skip


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """The first node of two, and a network for the second; both are ended and removed."""
    folder = Path(tempfile.mkdtemp(prefix="synthia-nodes-", dir="/tmp"))  # the path of a socket has 97 bytes at most
    try:
        _ip(f"netns add {_NAMESPACE}")
        _ip(f"link add {_HERE} type veth peer name {_THERE} netns {_NAMESPACE}")
        _ip(f"addr add {_FIRST}/24 dev {_HERE}")
        _ip(f"link set {_HERE} up")
        _ip(f"-n {_NAMESPACE} addr add {_SECOND}/24 dev {_THERE}")
        _ip(f"-n {_NAMESPACE} link set {_THERE} up")
        _ip(f"-n {_NAMESPACE} link set lo up")
        yield Nodes(folder)
    finally:
        local.stop(local.LocalRay("", str(folder), 0, {}, "", {}))
        for words in (f"link del {_HERE}", f"netns del {_NAMESPACE}"):
            with contextlib.suppress(click.ClickException):
                _ip(words)


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"ip {words}: {done.stderr.strip()}")


def _ray(words: Sequence[str], environment: dict[str, str], *, agent: int, prefix: Sequence[str] = ()) -> None:
    command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--num-cpus=1"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={128 * 2**20}"]
    command.append(f"--dashboard-agent-listen-port={agent}")  # Ray's fixed one may be another Ray's
    command += ["--disable-usage-stats", "--include-log-monitor=false", "--log-color=false"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    if done.returncode:
        raise click.ClickException(f"a node did not start: {(done.stdout + done.stderr)[-2000:]}")


@contextlib.contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


if __name__ == "__main__":
    asyncio.run(node(click.echo))
