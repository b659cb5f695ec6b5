"""A real Prometheus and its promtool, for the tests that need one."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from synthia_vllm.free_ports import free_port
from tests.tools import needed

_START_TIMEOUT_S = 30


class Prometheus:
    """`prometheus` on a port of its own, with its data in a temporary folder."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query's result: `metric` and `value` of each series."""
        return self._ask("query", query=expression)

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """`metric` and `values` of each series."""
        return self._ask("query_range", query=expression, start=start, end=end, step=step)

    def _ask(self, path: str, **params: Any) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=params, trust_env=False)
        found = reply.json()
        assert found["status"] == "success", found
        result: list[dict[str, Any]] = found["data"]["result"]
        return result


@contextmanager
def running_prometheus(folder: Path, config: str) -> Iterator[Prometheus]:
    """Starts it with this configuration, in YAML."""
    file = folder / "prometheus.yml"
    file.write_text(config)
    port = free_port()
    options = [
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([tool("prometheus"), *options], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"prometheus did not start:\n{(folder / 'prometheus.log').read_text()[-4000:]}")
        yield Prometheus(url)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips where there is none, unless SYNTHIA_REQUIRE_SERVICES=1."""
    return needed(name, "prometheus")


def promtool(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("promtool"), *words], input=stdin, capture_output=True, text=True, check=False)
