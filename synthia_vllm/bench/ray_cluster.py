"""A cluster on this machine while it is measured, and the ways into it: ours and the two of Ray Serve LLM."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import click
import httpx
from rich.console import Console

from synthia_vllm.bench.normal_ingress import ROUTE as NORMAL_ROUTE
from synthia_vllm.bench.normal_ingress import as_config
from synthia_vllm.cluster import local
from synthia_vllm.cluster.config import ENGINE_ROUTE, serve_config
from synthia_vllm.cluster.rest import ServeApi
from synthia_vllm.free_ports import free_port
from synthia_vllm.settings import Settings

_UP_TIMEOUT_S = 600


@contextlib.contextmanager
def running(words: list[str], console: Console) -> Iterator[tuple[int, float]]:
    """A cluster while it is needed; yields its port and how long it took to come up."""
    port = free_port()
    began = time.monotonic()
    try:
        up([*words, "--port", str(port)])
        seconds = time.monotonic() - began
        console.print(f"the cluster is up after {seconds:.0f} s", highlight=False)
        yield port, seconds
    finally:
        subprocess.run([sys.executable, "-m", "synthia_vllm", "cluster", "down", "--now"], check=False)


def up(words: list[str]) -> None:
    command = [sys.executable, "-m", "synthia_vllm", "cluster", "up", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_UP_TIMEOUT_S)
    if done.returncode:
        raise click.ClickException(f"the cluster did not come up:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def ways_in(settings: Settings, model: str) -> Iterator[dict[str, str]]:
    """The normal ingress beside what runs; yields the URLs of all three. All want `engine_key(settings)`."""
    base = f"http://127.0.0.1:{settings.port}"
    ray = _local_ray()
    api = ServeApi(ray.dashboard, ray.token)
    config = serve_config(settings)
    config["applications"].append(as_config(model))
    api.deploy(config)
    try:
        _wait_for(f"{base}{NORMAL_ROUTE}/v1/models")
        yield {"normal": f"{base}{NORMAL_ROUTE}", "direct": f"{base}{ENGINE_ROUTE}", "ours": base}
    finally:
        config["applications"].pop()
        api.deploy(config)


def _local_ray() -> local.LocalRay:
    found = local.find()
    assert found is not None
    return found


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + _UP_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                return
        time.sleep(1)
    raise click.ClickException(f"{url} does not answer")
