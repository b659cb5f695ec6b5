"""What a person sees while a cluster comes to what was asked for."""

import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

from synthia_vllm.cluster.config import ENGINE
from synthia_vllm.cluster.local import LocalRay, worker_log
from synthia_vllm.cluster.rest import ApplicationStatus, ReplicaStatus, ServeApi, applications, healthy
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings

_POLL_S = 1.0
_SETTLED_POLLS = 2  # Serve takes a moment to show that it has begun with a new config
_STATES = {"STARTING": "starting", "STOPPING": "finishing its requests", "PENDING_MIGRATION": "moving"}


def wait_until_settled(api: ServeApi, settings: Settings, local: LocalRay | None, console: Console) -> str:
    """Shows the replicas until all is as asked for and the gateway answers; returns its URL.

    On a terminal one live line a replica, elsewhere one line a change. Raises SetupError where Serve gives up.
    """
    url = _url(api, settings)
    view = _View(console, local)
    settled = 0
    with view:
        while settled < _SETTLED_POLLS:
            time.sleep(_POLL_S)
            found = applications(api.details())
            view.show(found)
            _raise_failure(found, local)
            settled = settled + 1 if healthy(found) else 0
        while not _answers(url, wait_for_replica=bool(found[ENGINE].target)):  # scaled to zero, none will come
            time.sleep(_POLL_S)
    return url


class _View:
    """The lines of all replicas, redrawn on a terminal and appended elsewhere."""

    def __init__(self, console: Console, local: LocalRay | None) -> None:
        self._console = console
        self._local = local
        self._began = time.monotonic()
        self._lines: dict[str, str] = {}
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> "_View":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, found: dict[str, ApplicationStatus]) -> None:
        lines = {}
        for application in found.values():
            if application.deployment_state == "NOT_STARTED":  # its builder runs
                lines[application.name] = "being built"
            else:
                lines[application.name] = f"{application.running()} of {application.target} replicas run"
            for replica in application.replicas:
                if replica.state != "RUNNING":
                    lines[f"{application.name} {replica.name}"] = self._phase(replica)
        seconds = f"({time.monotonic() - self._began:.0f} s)"
        if self._live is not None:
            self._live.update(Text("\n".join(f"{name}: {line}" for name, line in lines.items()) + f" {seconds}"))
        else:
            for name, line in lines.items():
                if self._lines.get(name) != line:
                    self._console.print(f"{name}: {line} {seconds}", highlight=False, markup=False)
        self._lines = lines

    def _phase(self, replica: ReplicaStatus) -> str:
        state = _STATES.get(replica.state, replica.state.lower())
        if replica.state != "STARTING" or replica.application != ENGINE:
            return state
        if replica.pid is None:
            return "waiting for its process"
        return _engine_phase(self._local, replica.pid) or "importing vLLM"


def _engine_phase(local: LocalRay | None, pid: int) -> str | None:
    from synthia_vllm.engine.startup import phase_of

    return phase_of(worker_log(local, pid)) if local is not None else "starting"


def _raise_failure(found: dict[str, ApplicationStatus], local: LocalRay | None) -> None:
    for application in found.values():
        if "DEPLOY_FAILED" in (application.state, application.deployment_state):
            where = f"\nLogs: {local.logs}" if local is not None else ""
            raise SetupError(f"the {application.name} application failed: {_cause(application.message)}{where}")


def _cause(message: str) -> str:
    """Of a traceback, the line that says something."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named: Callable[[str], bool] = lambda line: "Error: " in line  # noqa: E731
    return next((line for line in reversed(lines) if named(line)), message or "no reason was given")


def _url(api: ServeApi, settings: Settings) -> str:
    host = urlsplit(api.address).hostname if settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://[{host}]:{settings.port}" if host and ":" in host else f"http://{host}:{settings.port}"


def _answers(url: str, *, wait_for_replica: bool) -> bool:
    try:
        reply = httpx.get(f"{url}/{'ready' if wait_for_replica else 'health'}", timeout=5)
        if reply.status_code == httpx.codes.NOT_FOUND:
            reply = httpx.get(f"{url}/health", timeout=5)
    except httpx.HTTPError:
        return False
    return reply.status_code == httpx.codes.OK
