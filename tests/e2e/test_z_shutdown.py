"""The shared server's end; named so that it runs last."""

import os
import signal
import threading
import time

import httpx
import psutil
import pytest

from tests.conftest import RunningServer

pytestmark = pytest.mark.e2e


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(server: RunningServer) -> None:
    process = psutil.Process(server.pid)
    engine = process.children(recursive=True)
    body = {"model": "synthia", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "min_tokens": 200}
    lines: list[str] = []

    def read() -> None:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=90
        ) as reply:
            lines.extend(line for line in reply.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    while len(lines) < 5:
        time.sleep(0.05)
    os.killpg(server.pid, signal.SIGTERM)  # to the whole group, as a terminal does with Ctrl-C
    time.sleep(1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    reader.join(90)
    assert lines[-1] == "data: [DONE]"
    _, code = os.waitpid(server.pid, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    _, alive = psutil.wait_procs(engine, timeout=10)
    assert not alive
