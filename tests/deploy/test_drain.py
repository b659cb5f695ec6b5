"""Waiting for clients before a pod gets SIGTERM."""

import socket

import pytest

from synthia_vllm.manifests import drain as module
from synthia_vllm.manifests.drain import drain, open_connections


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)


def test_connections_of_clients_are_counted_and_the_listener_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert open_connections(port) == 0
        with socket.create_connection(("127.0.0.1", port)):
            served, _ = server.accept()
            assert open_connections(port) == 1
            served.close()


def test_it_ends_when_the_clients_have_gone() -> None:
    left = iter([2, 0, 1, 0, 0, 0])
    assert drain(8000, 10, count=lambda port: next(left))
    assert next(left, None) is None  # one that came back was waited for


def test_it_ends_when_time_is_up() -> None:
    assert not drain(8000, 0.05, count=lambda port: 1)
