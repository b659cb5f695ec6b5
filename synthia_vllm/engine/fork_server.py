"""Forks vLLM's processes from one that has imported what they need, while this one imports what it needs itself.

vLLM spawns its engine's process, and that one its worker: three times the same imports, one after the other, most of
the time that a small model takes to start. Python's fork server imports once, beside them. For CPUs: it was not tried
with a GPU's driver. A forked worker computes a little slower, and it is not known why (docs/measured.md); so it is the
demo's default alone (`--engine.fork`).

What vLLM tells its worker by the environment (its CPUs, how OpenMP is to wait) has to be there *before* the fork:
OpenMP, which `import torch` wakes, reads it anew in the middle of it.
"""

import importlib
import json
import os
from contextlib import suppress
from multiprocessing import forkserver, popen_forkserver, reduction
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

_PRELOADED = "synthia_vllm.engine.preloaded"
# What the engine's processes import, sooner or later, for a Llama on a CPU.
_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.v1.structured_output.backend_xgrammar",
    "synthia_vllm.engine.cpu_worker",
)
_PLACE = 4  # of the environment among the files that are sent: Python's own four come first


class _Popen(popen_forkserver.Popen):
    """Sends this process's environment along with the request for a new one."""

    def _launch(self, process_obj: BaseProcess) -> None:
        with os.fdopen(os.memfd_create("synthia-environment"), "w+") as file:
            # Where vLLM says nothing, a forked OpenMP would bind its process to one CPU.
            json.dump({"KMP_AFFINITY": "none", **os.environ}, file)
            file.flush()
            self._fds: list[int]
            self._fds.append(file.fileno())
            super()._launch(process_obj)  # type: ignore[misc]


class _Process(ForkServerProcess):
    """Has its parent's environment, where Python's would have that of the fork server's start."""

    _Popen = staticmethod(_Popen)


class _Context(ForkServerContext):
    Process = _Process


def start() -> None:
    """Starts the fork server, with this process's environment as it is now, and has vLLM in this process ask it."""
    forkserver.set_forkserver_preload([_PRELOADED])
    forkserver.ensure_running()
    _take_the_place_of_spawn()


def preload() -> None:
    """Imports what the engine's processes need; in the fork server, before it forks."""
    # A signal to the terminal's or a supervisor's process group is the server's: it drains first.
    os.setpgid(0, 0)
    # Python's own would have each child start a fork server of its own for its children.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    forkserver.reduction = SimpleNamespace(**{**vars(reduction), "recvfds": _received})  # type: ignore[attr-defined]
    _take_the_place_of_spawn()
    for name in _MODULES:
        importlib.import_module(name)
    with suppress(ImportError):
        # It looks for the place of the command line in memory once, by the environment as it was when we began.
        importlib.import_module("setproctitle").getproctitle()


def _received(sock: Any, size: int) -> list[int]:
    """The files of a request. Gives this process the environment of the one that asks; it forks next."""
    files: list[int] = reduction.recvfds(sock, size)
    with os.fdopen(os.dup(files[_PLACE])) as file:
        file.seek(0)
        environment = json.load(file)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    return files


def _take_the_place_of_spawn() -> None:
    """Where vLLM takes Python's context for its processes. Private to vLLM, and imported by name: this comes first."""
    from vllm.utils import system_utils

    system_utils.get_mp_context = _Context
