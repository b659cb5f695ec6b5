"""What vLLM runs in each of its processes (entry point `vllm.general_plugins`)."""

import multiprocessing
import os

ENGINE_VARIABLE = "SYNTHIA_ENGINE"


def register() -> None:
    """Moves the engine's processes out of the terminal's process group, for engines that we started.

    Ctrl-C reaches every process of the group at once; vLLM's workers then end in the middle of running requests
    (`v1/executor/multiproc_executor.py`, `signal_handler`). Only the server may decide: it drains first.
    """
    if os.environ.get(ENGINE_VARIABLE) and multiprocessing.parent_process() is not None:
        os.setpgid(0, 0)
