import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthia_vllm.errors import SetupError
from synthia_vllm.settings import (
    ClusterSettings,
    ReplicasSettings,
    ScalingSettings,
    load_settings,
    new_path,
    refuse_gateways_options,
    settings_of,
)


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


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--promt.style", "x"], "--prompt.style"),
        (["--prompt.stlye=x"], "--prompt.style"),
        (["--style", "x"], "--prompt.style"),
        (["--max-in-flight-tokens", "3"], "--fair.max-in-flight-tokens"),
        (["--max_body_bytes", "3"], "--max-body-bytes"),
        (["--Port", "3"], "--port"),
        (["--replicas", "3"], "--cluster.replicas or one of --replicas"),
        (["--prompt", '{"style": "script"}'], "one of --prompt"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest_and_without_the_whole_usage(
    argv: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SetupError, match=f"^{argv[0].partition('=')[0]}: there is no such option; .*{nearest}") as told:
        load_settings(argv)
    assert "\n" not in str(told.value)
    assert capsys.readouterr() == ("", "")


def test_every_unknown_option_is_told() -> None:
    with pytest.raises(SetupError, match=r"--promt\.style.*\n--prt"):
        load_settings(["--promt.style", "x", "--prt", "4"])


@pytest.mark.parametrize("argv", [["--nonsense", "1"], ["-x"], ["nonsense"], ["--port"], ["--", "--port"]])
def test_what_is_near_to_no_option_is_refused_too(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SetupError, match=argv[0]):
        load_settings(argv)
    assert capsys.readouterr() == ("", "")


def test_a_misspelt_variable_is_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHIA_PROMPT__STLYE", "card")
    with pytest.raises(SetupError, match=r"--prompt\.stlye: .*--prompt\.style"):
        load_settings([])


@pytest.mark.parametrize("name", ["SYNTHIA_PROMPT", "SYNTHIA_UPSTREAM"])
def test_a_variable_that_is_no_json_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "{")
    with pytest.raises(SetupError, match=name.rpartition("_")[2].lower()):
        load_settings([])


def test_a_secret_that_is_no_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "access__secret").write_bytes(b"\xff")
    monkeypatch.setenv("SYNTHIA_SECRETS", str(tmp_path))
    with pytest.raises(SetupError, match="SYNTHIA_SECRETS"):
        load_settings([])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port: 1\nhosts: [a\n", "line 3, column 1: expected ',' or ']'"),
        ("- port\n", "line 1: .*not a list"),
        ("port", "line 1: .*not a single value"),
        ("0", "line 1: .*not a single value"),
        ("1: 2", "line 1: .*no text"),
        (b"port: 1\nhost: \xff", "line 2: .*UTF-8"),
        (b"port: 1\nhost: a\0b", "line 2: .*UTF-8"),
        ("port: 1\nhost: !!python/object/apply:os.getcwd []", "line 2, column 7: .*python/object"),
        ("port: 1\nhost: a\nport: 2", "line 3, column 1: 'port' is there twice"),
        ("prompt: {style: card, style: script}", "line 1, column 23: 'style' is there twice"),
        ("port: !!timestamp 2027-13-45", "line 1, column 7: not a timestamp"),
        ("port: !!bool maybe", "line 1, column 7: not a bool"),
        ("port: " + "9" * 5000, "line 1, column 7: not a int"),
        ("port: *nothing", "line 1, column 7: .*alias"),
        ("[a]: 1", "line 1, column 1: .*unhashable"),
        ("port: 1\n---\nport: 2", "line 2, column 1: .*document"),
        ("[" * 3000, "nested too deep"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_file_that_is_no_settings_is_told_with_its_place(tmp_path: Path, text: str | bytes, told: str) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SetupError, match=f"^--config {re.escape(str(file))}: {told}") as error:
        load_settings(["--config", str(file)])
    assert "\n" not in str(error.value)


def test_what_a_library_does_to_yaml_changes_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text("port: !!timestamp 2027-13-45")
    code = (
        "import lmformatenforcer.external.jsonschemaobjectutil, sys\n"
        "from synthia_vllm.settings import load_settings\n"
        "load_settings(['--config', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], check=False, capture_output=True, text=True, timeout=300
    )
    assert "line 1, column 7: not a timestamp" in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["access: {secret: [hidden]}", "upstream_key: {hidden: 1}"])
def test_a_secret_of_another_type_is_not_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text(text)
    with pytest.raises(SetupError, match="valid string") as told:
        load_settings(["--config", str(file)])
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize("text", ["", "# nothing set\n", "<<: {port: 1}\nhost: ::1\n"])
def test_a_file_may_be_empty_or_merge(tmp_path: Path, text: str) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text(text)
    assert load_settings(["--config", str(file)]).port in (1, 8000)


def test_an_option_spelt_as_on_the_command_line_is_told_how_a_file_has_it(tmp_path: Path) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text("max-body-bytes: 1\n")
    with pytest.raises(SetupError, match="in a file it is written max_body_bytes"):
        load_settings(["--config", str(file)])


@pytest.mark.parametrize(
    "argv", [["--upstream", "http://x"], ["--upstream-key", "k"], ["--no-resume"], ["--tokenizer", "folder"]]
)
def test_what_only_a_gateway_takes_is_refused_with_the_cure(argv: list[str]) -> None:
    with pytest.raises(SetupError, match=f"^{argv[0].replace('--no-', '--')}: .*synthia-vllm gateway"):
        refuse_gateways_options(load_settings(argv), "synthia-vllm serve")


def test_a_gateways_option_at_its_default_is_none() -> None:
    refuse_gateways_options(load_settings(["--resume"]), "synthia-vllm serve")


_MOVED = {
    "routing": "it is --replicas.routing now, in the environment SYNTHIA_REPLICAS__ROUTING, in a file routing below "
    "replicas",
    "max_replicas": "it is --scaling.max-replicas now, in the environment SYNTHIA_SCALING__MAX_REPLICAS, in a file "
    "max_replicas below scaling",
}


@pytest.mark.parametrize("source", ["command line", "as a file has it", "environment", "file", "data"])
@pytest.mark.parametrize("name", _MOVED)
def test_a_name_of_before_is_told_with_the_one_of_now(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv: list[str] = []
    old = f"--cluster.{name.replace('_', '-')}"
    if source == "command line":
        argv = [f"{old}=3"]
    elif source == "as a file has it":
        argv = [f"--cluster.{name}", "3"]
        old = argv[0]
    elif source == "environment":
        monkeypatch.setenv(f"SYNTHIA_CLUSTER__{name.upper()}", "3")
    elif source == "file":
        file = tmp_path / "synthia.yaml"
        file.write_text(f"cluster: {{{name}: 3}}\n")
        argv = ["--config", str(file)]
    with pytest.raises(SetupError) as told:
        settings_of({"cluster": {name: 3}}) if source == "data" else load_settings(argv)
    assert str(told.value) == f"{old}: {_MOVED[name]}"


def test_a_setting_that_was_of_the_cluster_has_one_new_place() -> None:
    groups = {"cluster": ClusterSettings, "scaling": ScalingSettings, "replicas": ReplicasSettings}
    names = [name for group in groups.values() for name in group.model_fields]
    assert len(names) == len(set(names))
    for group, fields in groups.items():
        for name in fields.model_fields:
            assert new_path(f"cluster.{name}") == (None if group == "cluster" else f"{group}.{name}")
    assert new_path("fair.routing") is None
