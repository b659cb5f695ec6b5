import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from synthia_vllm.cli.chat import Conversation, command, obey, record, say
from synthia_vllm.prompt import SYSTEM_PROMPTS


def test_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    conversation = Conversation("S", [{"role": "user", "content": "a"}])
    assert obey("/reset", conversation)
    assert conversation.messages() == [{"role": "system", "content": "S"}]


def test_system_takes_a_preset_a_text_or_nothing() -> None:
    conversation = Conversation()
    obey("/system tot", conversation)
    assert conversation.system == SYSTEM_PROMPTS["tot"]
    obey("/system Be brief.", conversation)
    assert conversation.system == "Be brief."
    obey("/system", conversation)
    assert conversation.messages() == []


def test_save_writes_messages_and_survives_a_bad_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation("S", [{"role": "user", "content": "é"}])
    obey(f"/save {tmp_path / 'talk.json'}", conversation)
    assert json.loads((tmp_path / "talk.json").read_text()) == conversation.messages()
    obey(f"/save {tmp_path}", conversation)
    assert "not saved" in capsys.readouterr().out


def test_quit_ends_and_an_unknown_command_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert not obey("/quit", Conversation())
    assert obey("/nonsense", Conversation())
    assert "/reset" in capsys.readouterr().out


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    def stream():  # type: ignore[no-untyped-def]
        yield "An orca"
        raise KeyboardInterrupt

    assert say(stream) == "An orca"
    assert "stopped" in capsys.readouterr().out


def test_turns_are_appended_in_the_cards_form(tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    record(file, "a", "b")
    record(file, "c", "d")
    assert file.read_text() == '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n'


@pytest.mark.parametrize("typed", ["hi\n", ""])
@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/", "nonsense", "http://[::1"])
def test_a_missing_server_is_said_in_one_line_before_anything_is_typed(tmp_path: Path, url: str, typed: str) -> None:
    result = CliRunner().invoke(command, ["--url", url, "--file", str(tmp_path / "c")], input=typed)
    assert result.exit_code == 1
    assert result.output.startswith(f"synthia-vllm: there is no server at {url.rstrip('/')}; ")
    assert "synthia-vllm serve" in result.output
    assert len(result.output.splitlines()) == 1
