"""Ports that are still free when the process comes up that was told of them."""

import socket
from itertools import cycle
from pathlib import Path

import pytest

from synthia_vllm import free_ports as module
from synthia_vllm.errors import SetupError
from synthia_vllm.free_ports import free_port, free_ports


def test_none_is_given_twice_and_none_is_one_that_the_system_gives_itself() -> None:
    systems = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = free_ports(16) + [free_port() for _ in range(16)]
    assert len(set(found)) == 32
    assert all(port < systems for port in found) or systems <= 21_000


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_one_that_is_used_on_any_address_is_passed_over(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    used, free = free_ports(2)
    monkeypatch.setattr(module, "_candidates", lambda: cycle([used, free]))
    with socket.socket() as sock:
        sock.bind((host, used))
        assert free_port() == free
        monkeypatch.setattr(module, "_candidates", lambda: cycle([used]))
        with pytest.raises(SetupError, match="free ports were looked for between 20000"):
            free_port()


@pytest.mark.parametrize("told", ["", "1024\t65535", "nothing", None])
def test_where_the_system_tells_nothing_useful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    file = tmp_path / "range"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(module, "_SYSTEMS", file)
    module._last.cache_clear()
    try:
        assert module._last() == (65_536 if told == "1024\t65535" else 49_152)
    finally:
        module._last.cache_clear()
