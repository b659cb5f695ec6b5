"""What becomes of the engine's processes when their parent does not live any more."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from synthia_vllm.engine.plugin import ENGINE_VARIABLE

_SERVER = """
import multiprocessing, time
from synthia_vllm.engine.plugin import register

def engine():
    register()
    time.sleep(120)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=engine)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


def test_an_engine_ends_with_a_server_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    environment = {**os.environ, ENGINE_VARIABLE: "1"}
    server = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    engine = psutil.Process(int(server.stdout.readline()))
    while os.getpgid(engine.pid) != engine.pid:  # its own group: it has registered
        assert engine.is_running()
    server.send_signal(signal.SIGKILL)
    server.wait()
    _, alive = psutil.wait_procs([engine], timeout=30)
    assert not alive
