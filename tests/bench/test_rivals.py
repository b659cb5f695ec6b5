"""How a rival is found: its program, the environment that it lives in, and what it is told."""

import json
import sys
from pathlib import Path

import pytest

from synthia_vllm.bench.rivals import RIVALS, Engine, Rival

NAMES = ["smg", "vllm-router", "sglang-router", "litellm"]


def rival(package: str) -> Rival:
    return Rival("theirs", "Theirs", "their-gateway", lambda engine: [], package)


def environment(folder: Path) -> Path:
    """One whose Python is this one, with a program; returns the program."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program = folder / "their-gateway"
    program.write_text("#!/bin/sh\n")
    for file in (python, program):
        file.chmod(0o755)
    return program


def test_a_program_that_was_named_is_told_with_its_version(tmp_path: Path) -> None:
    program = environment(tmp_path)
    found, version = rival("click").find({"theirs": str(program)})
    assert found == str(program)
    assert version[0].isdigit()


def test_else_it_is_looked_for_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = environment(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rival("click").find({})[0] == str(program)


def test_one_that_is_not_here_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found, why = rival("their-package").find({})
    assert found is None
    assert "-m venv rivals/theirs && rivals/theirs/bin/pip install 'their-package'" in why
    assert "--rival theirs=rivals/theirs/bin/their-gateway" in why


def test_a_program_of_the_same_name_is_not_taken_for_it(tmp_path: Path) -> None:
    found, why = rival("no-such-package").find({"theirs": str(environment(tmp_path))})
    assert found is None
    assert "not of the package no-such-package" in why


def test_the_rivals_are_told_where_the_engine_is(tmp_path: Path) -> None:
    assert [each.name for each in RIVALS] == NAMES
    for each in RIVALS:
        words = each.arguments(Engine("http://127.0.0.1:1234", "small", tmp_path))
        told = " ".join([*words, *(file.read_text() for file in tmp_path.iterdir())])
        assert "http://127.0.0.1:1234" in told


def test_litellm_has_a_key_and_limits(tmp_path: Path) -> None:
    litellm = next(each for each in RIVALS if each.name == "litellm")
    _, file = litellm.arguments(Engine("http://127.0.0.1:1234", "small", tmp_path))
    config = json.loads(Path(file).read_text())
    assert config["general_settings"]["master_key"] == litellm.key
    assert {"rpm", "tpm"} <= config["model_list"][0]["litellm_params"].keys()
