"""`synthia-vllm chat` on a real terminal, against the real server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pexpect
import pytest

from tests.conftest import RunningServer
from tests.running import until

pytestmark = pytest.mark.e2e


def test_a_conversation_on_a_terminal(server: RunningServer, tmp_path: Path) -> None:
    words = ["-m", "synthia_vllm", "chat", "--url", server.url, "--max-tokens", "2000"]
    quiet = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        sys.executable, words, cwd=str(tmp_path), encoding="utf-8", timeout=60, dimensions=(40, 200), env=quiet
    )
    child.expect("You:")
    child.sendline("/system Be brief.")
    child.expect("system: Be brief")
    before = _first_tokens(server)
    child.sendline("Tell me a very long story about whales.")
    until(lambda: _first_tokens(server) > before, "the reply has begun")  # which may be of no word at all
    child.sendintr()  # stops the reply and not the program
    child.expect("You:")
    child.sendline("/save talk.json")
    child.expect("saved to talk.json")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    (line,) = (tmp_path / "Synthia-v3.0-11B-conversations.jsonl").read_text().splitlines()
    turn = json.loads(line)
    assert turn["prompt"] == "Tell me a very long story about whales."
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[-1]["content"] == turn["answer"]  # which the demo model may leave empty


def _first_tokens(server: RunningServer) -> float:
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(map(float, re.findall(r"^synthia_time_to_first_token_seconds_count\S* (\S+)$", page, re.MULTILINE)))


def test_lines_of_a_pipe(server: RunningServer, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "synthia_vllm", "chat", "--url", server.url, "--max-tokens", "10"]
    subprocess.run(words, input="hi\nand you?\n", text=True, cwd=tmp_path, timeout=120, check=True)
    assert len((tmp_path / "Synthia-v3.0-11B-conversations.jsonl").read_text().splitlines()) == 2
