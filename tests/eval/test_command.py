"""`synthia-vllm eval` as a user runs it, against a stand-in server."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from synthia_vllm.cli import cli
from synthia_vllm.errors import SetupError
from synthia_vllm.eval.server import find_endpoint
from tests.eval.conftest import DATA, StandIn


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYNTHIA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def evaluate(stand_in: StandIn, folder: Path, *words: str) -> Result:
    given = ["eval", "--url", stand_in.url, "--data", str(DATA), "--tasks", "truthfulqa_mc2", "--limit", "2"]
    return CliRunner().invoke(cli, [*given, "--output", str(folder / "out"), *words], obj=[])


def test_tables_and_figures_are_written_for_both_formats(stand_in: StandIn, folder: Path) -> None:
    done = evaluate(stand_in, folder, "--format", "both")
    assert done.exit_code == 0, done.output
    for format in ("plain", "chat"):
        written: dict[str, Any] = json.loads((folder / "out" / f"{format}.json").read_text())
        assert written["format"] == format
        (score,) = written["scores"]
        assert f"|*truthfulqa_mc*|mc2|{score['value']:.4f}|" in (folder / "out" / f"{format}.md").read_text()
    assert "truthfulqa_mc" in done.stdout


def test_the_same_command_asks_only_what_is_not_answered_yet(stand_in: StandIn, folder: Path) -> None:
    evaluate(stand_in, folder)
    asked = len(stand_in.prompts)
    assert "answers of earlier runs are there" in evaluate(stand_in, folder).stderr
    assert len(stand_in.prompts) == asked
    evaluate(stand_in, folder, "--fresh")
    assert len(stand_in.prompts) == 2 * asked


def test_an_interrupted_run_says_how_to_go_on(stand_in: StandIn, folder: Path) -> None:
    stand_in.interrupt_at = 3
    done = evaluate(stand_in, folder)
    assert done.exit_code == 130
    assert "the same command goes on" in done.stderr


def test_without_a_server_the_error_names_the_url() -> None:
    with pytest.raises(SetupError, match=r"--url http://127\.0\.0\.1:1: no answer"):
        find_endpoint("http://127.0.0.1:1", model=None, tokenizer=None, key="none")


def test_a_model_that_the_server_has_not_is_refused_with_those_it_has(stand_in: StandIn) -> None:
    with pytest.raises(SetupError, match="--served-model other: the server has stand-in"):
        find_endpoint(stand_in.url, model="other", tokenizer=None, key="none")
