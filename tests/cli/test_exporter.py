"""`synthia-vllm exporter`, as a process."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from synthia_vllm.bench.null.engine import NullEngine
from tests.gateway.live import exchange, serving


@contextmanager
def exporter(*words: str) -> Iterator[int]:
    with serving(NullEngine()) as engine:
        command = [sys.executable, "-m", "synthia_vllm", "exporter", "--port", "0", *words]
        upstream = f"http://127.0.0.1:{engine}"
        with subprocess.Popen([*command, "--upstream", upstream], stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if found := re.match(r"Ready: http://[^:]+:([0-9]+)/metrics", line):
                        yield int(found[1])
                        break
                else:
                    raise AssertionError("the exporter has ended")
            finally:
                process.terminate()
                process.communicate(timeout=20)
        assert process.returncode == 0


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    assert "SYNTHIA_ACCESS__HOSTS" not in os.environ
    with exporter("--access.hosts", "metrics.example.com") as port:
        yield port


def ask(port: int, host: str) -> bytes:
    return exchange(port, f"GET /metrics HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "metrics.example.com"])
def test_the_page_is_told_under_its_own_names(port: int, host: str) -> None:
    assert b"synthia_replica_up" in ask(port, host)


def test_a_page_of_a_foreign_name_reads_no_metrics(port: int) -> None:
    told = ask(port, "evil.example")
    assert told.startswith(b"HTTP/1.1 421")
    assert b"--access.hosts evil.example" in told
