"""The unit by systemd's own judgement."""

import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from deploy.generate import FOLDER
from synthia_vllm.manifests.render import render
from synthia_vllm.settings import Settings, load_settings
from tests.conftest import RunningServer
from tests.running import gateway
from tests.tools import needed
from tests.under_unit import UNIT

_MOST = 30  # tenths: 3.0


@pytest.fixture(params=["cpu", "gpu"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit on disk, with a program that is there in the place of ours."""
    gpus = {"gpus_per_node": 1} if request.param == "gpu" else {}
    settings = Settings(deploy=gpus)  # type: ignore[arg-type]
    text = render("systemd", settings, ["--max-num-seqs", "64"])["systemd/synthia.service"]
    path = tmp_path / "synthia.service"
    path.write_text(text.replace("/opt/synthia/bin/synthia-vllm", "/bin/true"))
    return path


def test_systemd_accepts_the_unit(unit: Path) -> None:
    words = [needed("systemd-analyze", "systemd"), "verify", "--recursive-errors=no", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_its_exposure_is_low(unit: Path) -> None:
    words = [needed("systemd-analyze", "systemd"), "security", "--offline=true", f"--threshold={_MOST}", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]
    assert re.search(r"exposure level for synthia.service: [0-2]\.", done.stdout)


def test_keys_are_asked_for_behind_the_proxy() -> None:
    """All clients come from this machine's own address then."""
    settings = load_settings(["--config", str(FOLDER / "systemd" / "settings.yaml")])
    assert (settings.host, settings.access.mode) == ("127.0.0.1", "keys")


def test_options_of_vllm_are_written_as_systemd_reads_them() -> None:
    text = render("systemd", Settings(), ["--x", 'a b"c', "50%"])["systemd/synthia.service"]
    assert 'serve -- --x "a b\\"c" 50%%\n' in text


def test_the_settings_are_yaml_without_secrets() -> None:
    told = yaml.safe_load((FOLDER / "systemd" / "settings.yaml").read_text())
    assert set(told) == {"log_file", "access"}
    assert set(told["access"]) == {"mode"}


def test_a_gateway_tells_systemd_that_it_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    server = gateway(tmp_path, [], "--upstream", "http://127.0.0.1:9")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        server.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        server.start()
        try:
            told = [manager.recv(100) for _ in range(3)]
            assert sorted(told) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        finally:
            server.stop()
        rest = []
        manager.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                rest.append(manager.recv(100))
        assert b"STOPPING=1" in rest


_TRIES = """
import os, socket
for family in (socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    try:
        socket.socket(family, socket.SOCK_RAW if family == socket.AF_NETLINK else socket.SOCK_DGRAM).close()
        print(family.name, "yes", flush=True)
    except OSError as error:
        print(family.name, error.strerror, flush=True)
os.chroot("/")
"""


def test_the_filters_of_the_tests_are_the_units() -> None:
    needed("systemd-analyze", "systemd")
    words = [sys.executable, "-m", "tests.under_unit", str(UNIT), sys.executable, "-c", _TRIES]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    refused = "AF_PACKET Address family not supported by protocol"
    assert done.stdout.splitlines() == ["AF_INET6 yes", "AF_NETLINK yes", refused], done.stderr
    assert done.returncode == -signal.SIGSYS, "a privileged call ends the process"


@pytest.mark.e2e
def test_the_engine_runs_under_the_units_filters(server: RunningServer) -> None:
    """That it started is the test: gloo in the engine's processes wants AF_NETLINK, for one."""
    needed("systemd-analyze", "systemd")
    whole = psutil.Process(server.pid)
    processes = [whole, *whole.children(recursive=True)]
    assert any("EngineCore" in " ".join(process.cmdline()) for process in processes)
    for process in processes:
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Seccomp_filters:\t2$", status, re.MULTILINE), process.name()
