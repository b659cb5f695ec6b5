"""A command line has what its command reads, and --help tells of nothing else."""

import ast
import inspect
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.cli import cli
from synthia_vllm.cli.reads import (
    CLUSTER_CONFIG,
    CLUSTER_UP,
    COMMANDS,
    DOCTOR,
    EXPORTER,
    GATEWAY,
    RENDER,
    SERVE,
    Reads,
    settings_for,
)
from synthia_vllm.engine.arguments import OF_VLLMS_SERVER, plan_engine
from synthia_vllm.engine.hardware import GIB, Machine
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import ReplicasSettings, Settings, field_of, group_of, option_of, path_of

ROOT = Path(__file__).parents[2]
SCREEN = 45  # lines
IDS = [reads.prog for reads in COMMANDS]


def leaves(model: type = Settings, prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        inner = group_of(field)
        found += leaves(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


ALL = leaves()


@pytest.mark.parametrize(
    ("reads", "words", "told"),
    [
        (SERVE, ["--cluster.replicas", "7"], "`synthia-vllm serve` does not read it; `synthia-vllm cluster up`"),
        (SERVE, ["--cluster.replicas=7"], "--cluster.replicas: "),
        (SERVE, ["--upstream", "http://x:1"], "`synthia-vllm gateway` and `synthia-vllm exporter` do"),
        (SERVE, ["--no-cluster.surge"], "--cluster.surge: "),
        (SERVE, ["--deploy.image", "x"], "leave it out"),
        (GATEWAY, ["--upstream", "http://x:1", "--engine.kv-cache-gib", "2"], "--engine.kv-cache-gib: "),
        (GATEWAY, ["--cluster.replicas", "2"], "--cluster.replicas: "),
        (EXPORTER, ["--fair.policy", "fcfs"], "--fair.policy: "),
        (CLUSTER_UP, ["--upstream", "http://x:1"], "--upstream: "),
        (
            CLUSTER_UP,
            ["--engine.fork"],
            "--engine.fork: `synthia-vllm cluster up` does not read it; `synthia-vllm serve`",
        ),
        (CLUSTER_CONFIG, ["--no-engine.fork"], "--engine.fork: "),
    ],
)
def test_what_a_command_does_not_read_is_refused_with_the_one_that_does(
    reads: Reads, words: list[str], told: str
) -> None:
    with pytest.raises(SetupError, match=re.escape(told)):
        settings_for(reads, words)


def test_all_that_is_refused_is_told_at_once_and_once() -> None:
    words = ["--cluster.replicas", "7", "--cluster.replicas", "8", "--tokenizer", "x", "--port", "1"]
    with pytest.raises(SetupError) as refused:
        settings_for(SERVE, words)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["--cluster.replicas", "--tokenizer"]


def test_a_file_that_several_commands_share_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("cluster: {replicas: 3}\ndeploy: {namespace: x}\nport: 9\n")
    monkeypatch.setenv("SYNTHIA_CLUSTER__GATEWAYS", "2")
    monkeypatch.setenv("SYNTHIA_CONFIG", "")  # where `--config` is kept
    settings = settings_for(SERVE, ["--config", str(file)])
    assert (settings.port, settings.cluster.replicas, settings.cluster.gateways) == (9, 3, 2)


def test_short_forms() -> None:
    settings = settings_for(CLUSTER_UP, ["--replicas", "2", "--address=head:8265", "--gateways=3", "--port", "1"])
    assert (settings.cluster.replicas, settings.cluster.address, settings.cluster.gateways) == (2, "head:8265", 3)
    assert settings.port == 1
    with pytest.raises(SetupError, match="no such option"):
        settings_for(SERVE, ["--replicas", "2"])


@pytest.mark.parametrize(
    "words",
    [
        ["--replicas", "2", "--replicas.routing", "round_robin"],
        ["--replicas.routing=round_robin", "--replicas=2"],
        ["--cluster.replicas", "2", "--replicas.routing", "round_robin"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("reads", [CLUSTER_UP, CLUSTER_CONFIG], ids=lambda reads: reads.prog)
def test_the_short_option_and_the_group_of_its_name_stand_beside_each_other(reads: Reads, words: list[str]) -> None:
    settings = settings_for(reads, words)
    assert (settings.cluster.replicas, settings.replicas.routing) == (2, "round_robin")


def test_a_gateway_has_the_group_and_not_the_short_option() -> None:
    assert settings_for(GATEWAY, ["--replicas.max-losses", "5"]).replicas.max_losses == 5
    for word in ("--replicas", "--replicas=2"):
        with pytest.raises(SetupError, match=r"^--replicas: there is no such option"):
            settings_for(GATEWAY, [word, "2"])


@given(st.sampled_from(COMMANDS), st.sampled_from([path for path in ALL if path != "config"]), st.booleans())
def test_an_option_is_read_or_refused_never_ignored(reads: Reads, path: str, no: bool) -> None:
    field = field_of(path)
    assert field is not None
    no = no and field.annotation is bool
    assert path_of(option_of(path, no=no)) == path
    words = [option_of(path, no=no)] + ([] if field.annotation is bool else ["?"])
    refused = ""
    try:
        settings_for(reads, words)
    except SetupError as error:
        refused = str(error)
    assert ("does not read it" in refused) == (not reads.has(path))


@pytest.mark.parametrize("reads", COMMANDS, ids=IDS)
def test_help_is_a_screen_and_help_all_has_everything(
    reads: Reads, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    for words in (["--help"], ["-h"], ["--port", "1", "--help"]):
        with pytest.raises(SystemExit) as ended:
            settings_for(reads, words)
        assert ended.value.code == 0
        page = capsys.readouterr().out
        assert len(page.splitlines()) <= SCREEN
        assert all(option_of(path) in page for path in reads.first)
        assert reads.about.split(":")[0] in " ".join(page.split())
    with pytest.raises(SystemExit):
        settings_for(reads, ["--help-all"])
    told = re.findall(r"(?:^  |, )(--[a-z][\w.-]+)", capsys.readouterr().out, re.MULTILINE)
    own = {option_of(short) for short, _ in reads.short}
    assert sorted(set(told) - own - {"--help", "--help-all"}) == sorted(option_of(p) for p in ALL if reads.has(p))


def test_no_default_is_told_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for reads in COMMANDS:
        with pytest.raises(SystemExit):
            settings_for(reads, ["--help-all"])
    page = capsys.readouterr().out
    assert not re.search(r"\(default:[^)]*\)\s*\[", page)
    assert "(default: None)" not in page


@pytest.mark.parametrize("reads", COMMANDS, ids=IDS)
def test_what_is_declared_exists(reads: Reads) -> None:
    assert all(field_of(path) is not None for path in (*reads.settings, *reads.first, *reads.unread))
    assert all(reads.has(path) for path in reads.first)
    assert all(field_of(path) is not None for _, path in reads.short)


def test_every_setting_is_read_by_some_command() -> None:
    """Beside `deploy render`, which reads all."""
    others = [reads for reads in COMMANDS if reads is not RENDER]
    assert [p for p in ALL if not p.startswith("deploy.") and not any(reads.has(p) for reads in others)] == []


def test_the_pool_goes_by_each_setting_of_replicas() -> None:
    """By the source: so a gateway, which has a pool and no cluster, reads the whole group."""
    used = {
        node.attr
        for file in (ROOT / "synthia_vllm" / "replicas").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert set(ReplicasSettings.model_fields) <= used


@pytest.mark.parametrize(
    ("option", "cure"),
    [
        ("--api-server-count", "--gateways N before the --"),
        ("--api_server_count=4", "--gateways N before the --"),
        ("--ssl-keyfile", "proxy"),
        ("--port", "before the --"),
        ("--tool-call-parser", "no tools"),
    ],
)
def test_an_option_of_vllms_server_is_refused_with_what_to_use_instead(option: str, cure: str) -> None:
    with pytest.raises(SetupError, match=rf"-- {option.partition('=')[0].replace('_', '-')}: .*{re.escape(cure)}"):
        plan_engine(Settings(model="demo"), Machine(2, 8 * GIB, 8 * GIB, ()), [option, "4"])


def test_the_options_refused_are_vllms() -> None:
    from synthia_vllm.engine.private_vllm import find

    module = inspect.getmodule(find("make_arg_parser"))
    fields = {f"--{name.replace('_', '-')}" for name in vars(module)["FrontendArgs"].__dataclass_fields__}
    fields |= {"--api-server-count", "--headless"}
    for pattern in OF_VLLMS_SERVER:
        assert any(re.fullmatch(pattern, field) for field in fields), pattern


def test_the_help_that_users_type_is_that_help() -> None:
    done = CliRunner().invoke(cli, ["serve", "--help"])
    assert done.exit_code == 0
    assert "--engine.max-model-len" in done.output
    assert "--cluster.replicas" not in done.output
    assert isinstance(cli, click.Group)
    assert DOCTOR.settings == SERVE.settings
