"""Ray Serve's REST API, the one that `serve deploy` uses, and what it tells about a cluster.

Spoken over HTTP here, without Ray: a laptop without Ray can look after a cluster, and commands start in no time.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from synthia_vllm.cluster.config import ENGINE, ENGINE_DEPLOYMENT, GATEWAY, GATEWAY_DEPLOYMENT
from synthia_vllm.errors import SetupError

_APPLICATIONS = "/api/serve/applications/"
_TIMEOUT_S = 60.0  # the first deployment starts Serve's controller


def token_from_environment() -> str | None:
    """The token of a Ray that asks for one, where Ray's own commands look for it (RAY_AUTH_MODE=token)."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text().strip() if path.is_file() else None


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica as Serve's controller sees it. `since` is Unix time."""

    application: str
    name: str
    state: str  # STARTING, RUNNING, STOPPING, …
    node: str
    pid: int | None
    since: float


@dataclass(frozen=True)
class ApplicationStatus:
    """One of our applications; `target` is the number of replicas that it is to have."""

    name: str
    state: str  # DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, DELETING
    message: str
    deployment_state: str  # HEALTHY, UPDATING, UPSCALING, DOWNSCALING, UNHEALTHY, DEPLOY_FAILED
    target: int
    replicas: tuple[ReplicaStatus, ...]

    def running(self) -> int:
        return sum(replica.state == "RUNNING" for replica in self.replicas)

    def settled(self) -> bool:
        """Nothing starts, stops or waits to."""
        whole = self.running() == self.target and len(self.replicas) == self.target
        return whole and self.state == "RUNNING" and self.deployment_state == "HEALTHY"


class ServeApi:
    """Serve behind the dashboard at `address`. Raises SetupError where it can't be reached or refuses."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address if "://" in address else f"http://{address}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=self.address, timeout=_TIMEOUT_S, headers=headers)

    def deploy(self, config: Mapping[str, Any]) -> None:
        self._ask("PUT", config)

    def delete(self) -> None:
        """Removes all applications and Serve with them, after a drain."""
        self._ask("DELETE", timeout=None)

    def details(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET").json()
        return found

    def _ask(
        self, method: str, config: Mapping[str, Any] | None = None, timeout: Any = httpx.USE_CLIENT_DEFAULT
    ) -> Any:
        try:
            reply = self._http.request(method, _APPLICATIONS, json=config, timeout=timeout)
        except httpx.HTTPError as error:
            raise SetupError(
                f"Ray's dashboard at {self.address} does not answer ({error or type(error).__name__}); "
                "--cluster.address takes its HOST:PORT, and `synthia-vllm cluster up` without it starts a local Ray"
            ) from None
        if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise SetupError(
                f"Ray at {self.address} asks for its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file"
            )
        if reply.status_code != httpx.codes.OK:
            raise SetupError(f"Ray Serve at {self.address} refused: {reply.text.strip()[-2000:]}")
        return reply


def applications(details: Mapping[str, Any]) -> dict[str, ApplicationStatus]:
    """Our two applications, as far as they are there, from what Serve's REST API tells."""
    found = {}
    for name, deployment_name in ((ENGINE, ENGINE_DEPLOYMENT), (GATEWAY, GATEWAY_DEPLOYMENT)):
        application = details.get("applications", {}).get(name)
        if application is None:
            continue
        deployment = application.get("deployments", {}).get(deployment_name) or {}
        found[name] = ApplicationStatus(
            name=name,
            state=application["status"],
            message=(application.get("message") or deployment.get("message") or "").strip(),
            deployment_state=deployment.get("status", "NOT_STARTED"),
            target=deployment.get("target_num_replicas", 0),
            replicas=tuple(
                ReplicaStatus(
                    name,
                    replica["replica_id"],
                    replica["state"],
                    replica.get("node_ip") or "",
                    replica.get("pid"),
                    replica["start_time_s"],
                )
                for replica in deployment.get("replicas") or ()
            ),
        )
    return found


def healthy(found: Mapping[str, ApplicationStatus]) -> bool:
    """Both applications are there and whole."""
    return set(found) == {ENGINE, GATEWAY} and all(application.settled() for application in found.values())
