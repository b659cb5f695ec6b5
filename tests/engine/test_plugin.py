"""What our plugin does in each of the engine's processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from synthia_vllm.engine.plugin import ENGINE_VARIABLE

_SERVER = """
import multiprocessing, sys, time
from synthia_vllm.engine import plugin

def engine():
    plugin.register()
    gone = plugin._is_gone(multiprocessing.parent_process())
    print("engine", multiprocessing.current_process().pid, gone, flush=True)
    time.sleep(120)

if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=engine)
    child.start()
    child.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_engine_ends_with_a_server_that_was_killed(tmp_path: Path, method: str) -> None:
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    environment = {**os.environ, ENGINE_VARIABLE: "1"}
    server = subprocess.Popen([sys.executable, str(script), method], stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    _, pid, gone = next(line for line in server.stdout if line.startswith("engine")).split()  # vLLM says things too
    assert gone == "False"
    engine = psutil.Process(int(pid))
    assert os.getpgid(engine.pid) == engine.pid, "a group of its own"
    server.send_signal(signal.SIGKILL)
    server.wait()
    _, alive = psutil.wait_procs([engine], timeout=30)
    assert not alive


_WORKER = """
from synthia_vllm.engine import plugin
plugin.register()
plugin.register()
from vllm.v1.worker.gpu_input_batch import InputBatch
print("mended:", hasattr(InputBatch.add_request, "__wrapped__"))
"""


@pytest.mark.parametrize("ours", [True, False])
def test_a_worker_that_ray_started_is_mended_too(ours: bool) -> None:
    """It has no parent process. Engines that are not ours are left as they are."""
    environment = {name: value for name, value in os.environ.items() if name != ENGINE_VARIABLE}
    environment |= {ENGINE_VARIABLE: "1"} if ours else {}
    done = subprocess.run(
        [sys.executable, "-c", _WORKER], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert f"mended: {ours}" in done.stdout
