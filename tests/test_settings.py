from pathlib import Path

import pytest

from synthia_vllm.errors import SetupError
from synthia_vllm.settings import load_settings


@pytest.fixture(autouse=True)
def no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHIA_CONFIG", "")


def test_command_line_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text("port: 1\nhost: ::1\nprompt: {style: script, turn_end: </s>}\n")
    monkeypatch.setenv("SYNTHIA_PORT", "2")
    monkeypatch.setenv("SYNTHIA_PROMPT__STYLE", "card")
    settings = load_settings(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.host, settings.prompt.style, settings.prompt.turn_end) == (3, "::1", "card", "</s>")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "99999"], r"--port '99999'.*65535"),
        (["--config", "/nowhere"], "--config /nowhere"),
        (["--engine.kv-cache-gib", "-1"], r"--engine\.kv-cache-gib '-1'"),
    ],
)
def test_a_wrong_value_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        load_settings(argv)


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text("prompt: {stile: card}\n")
    with pytest.raises(SetupError, match=r"--prompt\.stile"):
        load_settings(["--config", str(file)])


def test_an_unknown_option_ends_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        load_settings(["--nonsense", "1"])
