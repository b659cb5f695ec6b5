"""Whose processes `cluster down` ends."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from synthia_vllm.cluster import local
from synthia_vllm.cluster.local import LocalRay
from synthia_vllm.free_ports import free_ports
from tests.running import until


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv("SYNTHIA_DATA", str(tmp_path / "data"))
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def ray_of(folder: Path, processes: dict[str, float]) -> LocalRay:
    return LocalRay("127.0.0.1:1", str(folder), 8000, {}, "", processes)


def test_a_process_id_that_was_used_again_is_left_alone(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    ray = ray_of(
        tmp_path / "ray", {str(sleeper.pid): psutil.Process(sleeper.pid).create_time() - 100, str(os.getpid()): 1.0}
    )
    assert not ray.alive()
    local.stop(ray)
    assert psutil.pid_exists(sleeper.pid)


def test_what_was_started_is_ended(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    ray = ray_of(tmp_path / "ray", {str(sleeper.pid): psutil.Process(sleeper.pid).create_time()})
    assert ray.alive()
    local.stop(ray)
    assert not psutil.pid_exists(sleeper.pid)


def test_what_lost_its_parents_is_known_by_its_environment(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    orphan = subprocess.Popen(["sleep", "60"], env={**os.environ, "SYNTHIA_CLUSTER_FOLDER": str(folder)})
    reader = subprocess.Popen(["tail", "-f", "/dev/null", str(folder)], stderr=subprocess.DEVNULL)
    try:
        local.stop(ray_of(folder, {}))
        assert not psutil.pid_exists(orphan.pid)
        assert psutil.pid_exists(sleeper.pid)
        assert reader.poll() is None, "someone who reads its logs is none of its processes"
        assert not folder.exists()
    finally:
        reader.kill()
        reader.wait()


def test_without_a_cluster_there_is_none(sleeper: subprocess.Popen[bytes]) -> None:
    assert local.find() is None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_haproxys_figures_are_for_this_machine_only(tmp_path: Path, host: str) -> None:
    gateway, metrics, stats = free_ports(3)
    haproxy = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=gateway),
        metrics_port=metrics,
        stats_port=stats,
        socket_path=str(tmp_path / "a.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        metrics_socket_path=str(tmp_path / "m.sock"),
        error_file_path=None,
    )
    config = tmp_path / "haproxy.cfg"
    HAProxyApi(cfg=haproxy, config_file_path=str(config))._generate_config_file_internal()
    script = local.haproxy_within(tmp_path, [metrics, stats])["RAY_SERVE_HAPROXY_BINARY_PATH"]
    process = subprocess.Popen([script, "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        addresses = until(lambda: listening(process.pid), "HAProxy listens", 10)
    finally:
        process.kill()
        process.wait()
    assert addresses == {gateway: host, metrics: "127.0.0.1", stats: "127.0.0.1"}


def listening(pid: int) -> dict[int, str]:
    found = psutil.Process(pid).net_connections("tcp")
    return {one.laddr.port: one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
