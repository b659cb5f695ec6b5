"""The examples run as they are, against the real server; `offline.py` runs in `test_offline`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningServer

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(file.name for file in FOLDER.glob("*.py"))
QUESTIONS = "What is an orca?\n\nWhat does it eat?\n"


def run(name: str, url: str, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "SYNTHIA_URL": url}
    command = [sys.executable, str(FOLDER / name), *words]
    return subprocess.run(
        command, input=QUESTIONS, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def answered(name: str, url: str, *words: str) -> str:
    done = run(name, url, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["chat.py", "stream.py", "reconnect.py", "claude.py"])
def test_it_answers(server: RunningServer, name: str) -> None:
    for words in ([], ["Who", "are", "you?"]):
        assert any(answered(name, server.url, *words).strip() for _ in range(5))  # a sampled reply may be empty


def test_many_are_asked_at_once(server: RunningServer) -> None:
    asked = [question for question in QUESTIONS.splitlines() if question]
    assert [line for line in answered("many.py", server.url).splitlines() if line in asked] == asked


def test_the_batch_file_is_one() -> None:
    done = run("batch.py", "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["custom_id"] for line in lines] == ["q1", "q2"]
    assert lines[1]["body"]["messages"] == [{"role": "user", "content": "What does it eat?"}]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_short_and_says_how_it_is_run(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) <= 30
    assert f"examples/{name}" in text.splitlines()[0]
