"""What Serve's REST API tells, as we read it."""

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from synthia_vllm.cluster.config import ENGINE_DEPLOYMENT, GATEWAY_DEPLOYMENT
from synthia_vllm.cluster.rest import ServeApi, applications, healthy
from synthia_vllm.errors import SetupError


def details(engine_states: list[str], *, target: int = 2, status: str = "HEALTHY") -> dict[str, Any]:
    def app(state: str, deployment: str, replicas: list[str], wanted: int, health: str) -> dict[str, Any]:
        listed = [
            {"replica_id": f"r{number}", "state": replica, "node_ip": "10.0.0.1", "pid": 7, "start_time_s": 1.0}
            for number, replica in enumerate(replicas)
        ]
        one = {"status": health, "target_num_replicas": wanted, "replicas": listed, "message": ""}
        return {"status": state, "message": "", "deployments": {deployment: one}}

    return {
        "applications": {
            "engine": app("RUNNING", ENGINE_DEPLOYMENT, engine_states, target, status),
            "gateway": app("RUNNING", GATEWAY_DEPLOYMENT, ["RUNNING"], 1, "HEALTHY"),
            "someone-elses": app("DEPLOY_FAILED", "x", [], 1, "UNHEALTHY"),
        }
    }


def test_a_whole_cluster_is_healthy() -> None:
    assert healthy(applications(details(["RUNNING", "RUNNING"])))
    assert healthy(applications(details([], target=0))), "at rest, scaled to zero"


@pytest.mark.parametrize(
    "found",
    [
        details(["RUNNING"]),
        details(["RUNNING", "STARTING"]),
        details(["RUNNING", "RUNNING", "STOPPING"]),
        details(["RUNNING", "RUNNING"], status="UPDATING"),
        {"applications": {}},
        {},
    ],
)
def test_one_in_motion_is_not(found: dict[str, Any]) -> None:
    assert not healthy(applications(found))


def test_an_application_that_is_still_built_has_no_replicas() -> None:
    found = applications({"applications": {"engine": {"status": "DEPLOYING", "message": "", "deployments": {}}}})
    assert (found["engine"].target, found["engine"].deployment_state) == (0, "NOT_STARTED")
    assert not found["engine"].settled()


class _Dashboard(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer right"
        body = b"{}" if known else b"no"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_rays_token_goes_along(dashboard: str) -> None:
    assert ServeApi(dashboard, "right").details() == {}
    with pytest.raises(SetupError, match="RAY_AUTH_TOKEN"):
        ServeApi(dashboard).details()


def test_a_dashboard_that_is_not_there_is_named_with_its_option() -> None:
    with pytest.raises(SetupError, match=r"127\.0\.0\.1:1 does not answer .* --cluster\.address"):
        ServeApi("127.0.0.1:1").details()
