"""What vLLM runs in each of its processes (entry point `vllm.general_plugins`)."""

import multiprocessing
import os
import select
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.forkserver import get_inherited_fds
from multiprocessing.process import BaseProcess

from synthia_vllm.engine import spinning, token_masks

# Not SYNTHIA_ENGINE: that is the settings' section of this name, also to a replica that reads them in the same process.
ENGINE_VARIABLE = "SYNTHIA_ENGINE_PROCESS"
_LOOK_S = 2.0


def register() -> None:
    """Puts right what vLLM's batch mixes up between users, and ties the engine's processes to the server alone.

    For engines that we started: the former in each of their processes (`token_masks`), those on other nodes included,
    which are Ray's; the latter in those that have a parent. On a CPU they sleep soon when nothing comes (`spinning`).

    Out of the terminal's process group: Ctrl-C reaches every process of the group at once, and vLLM's workers then end
    in the middle of running requests (`v1/executor/multiproc_executor.py`, `signal_handler`). Only the server may
    decide: it drains first.

    And gone with it: an engine core whose server was killed (`kill -9`, out of memory) otherwise waits for requests
    for ever, with the weights and the KV cache in memory that the next one needs.
    """
    if not os.environ.get(ENGINE_VARIABLE):
        return
    token_masks.install()
    if _on_a_cpu():
        spinning.install()
    parent = multiprocessing.parent_process()
    if parent is None or os.getpgrp() == os.getpid():
        return
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(parent,), name="synthia-end-with-parent", daemon=True).start()


def _on_a_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _end_with(parent: BaseProcess) -> None:
    """At once: what the engine still computes for nobody would slow down those who take over its requests."""
    while not _is_gone(parent) and parent.pid is not None:
        try:
            descriptor = os.pidfd_open(parent.pid)  # Linux
        except (AttributeError, OSError):
            # Its end of a pipe closes, whatever ended it; unless another child holds that end too.
            parent.join(_LOOK_S)
        else:
            select.select([descriptor], [], [])
            break
    os.kill(os.getpid(), signal.SIGKILL)


def _is_gone(parent: BaseProcess) -> bool:
    """Whether it ended before we looked; its process id may be somebody else's by now."""
    if get_inherited_fds() is None:  # else we are the fork server's child, whoever our parent is
        return os.getppid() != parent.pid
    return bool(wait([parent.sentinel], 0))
