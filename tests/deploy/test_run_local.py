"""`deploy/compose/run-local`: the Compose services' commands as plain processes, and they answer."""

import re
import subprocess
import sys

import httpx
import pytest

from deploy.generate import FOLDER
from tests.conftest import RunningServer
from tests.running import until
from tests.tools import needed

pytestmark = pytest.mark.e2e


def test_the_services_commands_answer(server: RunningServer) -> None:
    """With the run's engine in the place of the file's, so that there is no second one."""
    needed("redis-server", "redis-server")
    needed("prometheus", "prometheus")
    process = subprocess.Popen(
        [FOLDER / "compose" / "run-local", "--engine", server.url],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin:/usr/sbin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = {}
        for line in process.stdout:
            name, _, url = line.strip().partition(": answers at ")
            found[name] = url
            if name == "prometheus":
                break
        assert {"gateway", "redis", "prometheus"} <= set(found), process.stderr
        until(lambda: httpx.get(f"{found['gateway']}/ready", timeout=60).status_code == 200, "the gateway is ready")
        chat = {"model": "synthia", "messages": [{"role": "user", "content": "x"}]}
        assert (
            httpx.post(f"{found['gateway']}/v1/chat/completions", json=chat, timeout=60).status_code == 401
        )  # it asks for keys
        targets = f"{found['prometheus']}/api/v1/targets"
        up = until(
            lambda: re.search('"health":"(up|down)"', httpx.get(targets, timeout=60).text), "the gateway is scraped", 40
        )
        assert up.group(1) == "down"  # 401: its key is none
    finally:
        process.terminate()
        process.wait(100)
