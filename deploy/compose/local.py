"""The Compose services' commands as plain processes: `deploy/compose/run-local`.

For machines without a container engine, and for the test that the file's commands work. What the file says is taken
from the file; only what a container would have given is put in its place: names of other services become addresses of
this machine, ports become free ones, paths in containers become folders here. Services whose programs are not installed
here, and whose image starts them itself (Grafana, PostgreSQL), are left out; without PostgreSQL keys are in SQLite.
"""

import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
import httpx
import yaml

from synthia_vllm.free_ports import free_ports

_FOLDER = Path(__file__).parent
# Services that a command of ours can be, by the program they need; and the ports that the file gives them.
_PROGRAMS = {"redis": "redis-server", "prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}
_PORTS = {"redis": 6379, "prometheus": 9090, "alertmanager": 9093}
_ANSWERS = {"gateway": "/health", "engine": "/ready", "prometheus": "/-/ready", "alertmanager": "/-/ready"}
_ORDER = ("redis", "engine", "gateway", "alertmanager", "prometheus")


@dataclass
class Place:
    """A folder that stands for the containers' file systems, and the ports that stand for their names."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)

    def translated(self, text: str) -> str:
        """A command or a configuration as it is on this machine."""
        for name, port in self.ports.items():
            inside = _PORTS.get(name, port)
            text = re.sub(rf"\b{name}:{inside}\b", f"127.0.0.1:{port}", text)
        return text


@click.command()
@click.option("--engine", help="URL of an engine that runs already, in the place of the file's")
@click.option("--without", multiple=True, type=click.Choice(_ORDER), help="leave a service out; several times")
@click.option("--timeout", default=900.0, show_default=True, help="seconds until all have to answer")
@click.option("--once", is_flag=True, help="end when all have answered")
def main(engine: str | None, without: tuple[str, ...], timeout: float, once: bool) -> None:
    """Start the services, wait until each answers, and end them on Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    services = yaml.safe_load((_FOLDER / "compose.yaml").read_text())["services"]
    wanted = [name for name in _ORDER if name not in without and not (name == "engine" and engine)]
    for name in list(wanted):
        if name in _PROGRAMS and shutil.which(_PROGRAMS[name]) is None:
            click.echo(f"{name}: {_PROGRAMS[name]} is not installed, left out", err=True)
            wanted.remove(name)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="synthia-compose-") as folder:
        place = Place(Path(folder), dict(zip(wanted, free_ports(len(wanted)), strict=True)))
        _PORTS.update(gateway=_port("gateway"), engine=_port("engine"))
        try:
            for name in wanted:
                processes[name] = _start(name, services[name], place, engine, wanted)
            for name in wanted:
                _wait(name, processes, place, timeout)
                click.echo(f"{name}: answers at http://127.0.0.1:{place.ports[name]}")
            if not once:
                click.echo("Stop with Ctrl-C", err=True)
                signal.pause()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)
        finally:
            for process in reversed(processes.values()):
                process.terminate()
            for process in processes.values():
                try:
                    process.wait(90)
                except subprocess.TimeoutExpired:
                    process.kill()


def _start(
    name: str, service: dict[str, Any], place: Place, engine: str | None, wanted: list[str]
) -> "subprocess.Popen[bytes]":
    own = place.folder / name
    (own / "data").mkdir(parents=True)
    words = [place.translated(word) for word in service["command"]]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin", "HOME": str(own / "data")}
    if name in ("gateway", "engine"):
        config = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())
        config |= {"host": "127.0.0.1", "port": place.ports[name]}
        if name == "gateway":
            config["access"] = {**config.get("access", {}), "mode": "keys"}
            config["upstream"] = [engine] if engine else config["upstream"]
            if "redis" not in wanted:
                config["limits"].pop("redis")
            environment["SYNTHIA_SECRETS"] = str(_secrets(own))
        (own / "settings.yaml").write_text(place.translated(yaml.safe_dump(config)))
        environment |= {"SYNTHIA_CONFIG": str(own / "settings.yaml"), "SYNTHIA_DATA": str(own / "data")}
        environment |= {"PYTHONPATH": str(_FOLDER.parents[1]), "HOME": str(Path.home())}
        words = [sys.executable, "-m", "synthia_vllm", *words]
    elif name == "redis":
        words += ["--port", str(place.ports[name]), "--bind", "127.0.0.1", "--dir", str(own)]
    else:
        words = [_PROGRAMS[name], *_watching(name, words, own, place)]
    with (place.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def _watching(name: str, words: list[str], own: Path, place: Place) -> list[str]:
    """Prometheus' or Alertmanager's options with their files here; the key is one that opens nothing yet."""
    file = "prometheus.yml" if name == "prometheus" else "alertmanager.yml"
    config = place.translated((_FOLDER / file).read_text())
    (own / "metrics_key").write_text("none")
    config = config.replace("/run/secrets/metrics_key", str(own / "metrics_key"))
    config = config.replace("rules/*.yml", str(_FOLDER.parent / "prometheus" / "rules" / "*.yml"))
    (own / file).write_text(config)
    here = {f"/etc/{name}/{file}": own / file, "/prometheus": own / "data", "/tmp": own / "data"}
    options = (word.split("=", 1) for word in words)
    words = [f"{option}={here.get(value, value)}" for option, value in options]
    more = [f"--web.listen-address=127.0.0.1:{place.ports[name]}"]
    return words + more + (["--cluster.listen-address="] if name == "alertmanager" else [])


def _secrets(own: Path) -> Path:
    """A folder of secrets as Docker gives one; no database among them, so keys are in the data folder."""
    folder = own / "secrets"
    folder.mkdir(mode=0o700)
    (folder / "access__secret").write_text(secrets.token_hex(32))
    return folder


def _wait(name: str, processes: dict[str, "subprocess.Popen[bytes]"], place: Place, timeout: float) -> None:
    """Until it answers. Raises ClickException with the end of its log where it ended, or time ran out."""
    deadline = time.monotonic() + timeout
    while True:
        if _answers(name, place.ports[name]):
            return
        if processes[name].poll() is not None or time.monotonic() > deadline:
            log = (place.folder / f"{name}.log").read_text(errors="replace")
            raise click.ClickException(f"{name} does not answer:\n{log[-3000:]}")
        time.sleep(0.2)


def _answers(name: str, port: int) -> bool:
    if name == "redis":
        done = subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True, check=False)
        return done.stdout.strip() == b"PONG"
    try:
        return httpx.get(f"http://127.0.0.1:{port}{_ANSWERS[name]}", timeout=10, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _port(name: str) -> int:
    return int(yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())["port"])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
