"""What systemd is told, on a socket of our own in its place."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from synthia_vllm.gateway.edge.service_manager import ServiceManager


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        yield sock, path


def told(sock: socket.socket) -> list[str]:
    found = []
    try:
        while True:
            found.append(sock.recv(100).decode())
    except BlockingIOError:
        return found


def test_ready_and_stopping_are_told(listening: tuple[socket.socket, str]) -> None:
    sock, path = listening
    manager = ServiceManager({"NOTIFY_SOCKET": path})
    manager.ready()
    manager.alive()  # no watchdog was asked for
    manager.stopping()
    assert told(sock) == ["READY=1", "STOPPING=1"]


def test_the_watchdog_hears_twice_as_often_as_it_asks(listening: tuple[socket.socket, str]) -> None:
    sock, path = listening
    watched = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
    manager = ServiceManager(watched)
    for _ in range(3):
        manager.alive()
    assert told(sock) == ["WATCHDOG=1"]
    time.sleep(0.11)
    manager.alive()
    assert told(sock) == ["WATCHDOG=1"]


def test_another_process_watchdog_is_not_ours(listening: tuple[socket.socket, str]) -> None:
    sock, path = listening
    ServiceManager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"}).alive()
    assert told(sock) == []


def test_a_manager_that_is_gone_is_no_error() -> None:
    ServiceManager({"NOTIFY_SOCKET": "/nowhere"}).ready()
    ServiceManager({}).ready()
