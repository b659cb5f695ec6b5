import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from synthia_vllm.cli import COMMANDS, cli, split_options

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "ray", "transformers")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "synthia_vllm", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "statement", ["import synthia_vllm", "from synthia_vllm.cli import cli; cli(['--help'], standalone_mode=False)"]
)
def test_import_and_help_stay_light(statement: str) -> None:
    code = f"{statement}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "synthia-vllm" in done.stdout


@pytest.mark.parametrize(
    ("package", "words"),
    [("matplotlib", ["run", "--server", "http://127.0.0.1:1"]), ("numba", ["size", __file__, "--rate", "1"])],
)
def test_a_package_that_is_missing_is_named_with_the_cure_and_at_once(package: str, words: list[str]) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from synthia_vllm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "bench", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: bench needs {package}, which is not installed; install synthia-vllm[bench]")


def test_an_unknown_command_is_refused() -> None:
    assert CliRunner().invoke(cli, ["nonsense"]).exit_code == 2
    done = CliRunner().invoke(cli, ["sevre"])
    assert (done.exit_code, "Did you mean 'serve'?" in done.output) == (2, True)


def test_a_public_address_is_refused_without_keys() -> None:
    done = run("serve", "--host", "0.0.0.0", "--port", "0", "--access.mode", "open")
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_a_taken_port_is_known_before_anything_loads() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "in use" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--access.database", "sqlite:////nowhere/at/all.db"),
        ("--limits.redis", "nonsense"),
        ("--tracing.otlp-endpoint", "x:4317"),
    ],
)
def test_a_store_that_is_not_there_is_known_before_anything_loads(option: str, value: str) -> None:
    done = run("serve", "--port", "0", option, value)
    assert done.returncode == 2
    assert option in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["serve"], ["cluster", "up"], ["cluster", "config"], ["doctor"]], ids=" ".join)
@pytest.mark.parametrize("options", [["--upstream", "http://127.0.0.1:1"], ["--no-resume"]], ids=" ".join)
def test_an_option_of_the_gateway_is_refused_where_an_engine_would_load(words: list[str], options: list[str]) -> None:
    done = run(*words, *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"synthia-vllm: {options[0].replace('--no-', '--')}: ")
    assert "`synthia-vllm gateway`" in done.stderr


@pytest.mark.parametrize("command", ["serve", "gateway", "exporter", "doctor"])
def test_a_misspelt_option_is_one_line_and_2(command: str) -> None:
    done = run(command, "--promt.style", "script")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "synthia-vllm: --promt.style: there is no such option; did you mean --prompt.style?\n"


@pytest.mark.parametrize("words", [["gateway", "--upstream", "http://127.0.0.1:1"], ["keys", "list"]], ids=" ".join)
def test_vllms_options_are_refused_where_no_vllm_starts(words: list[str]) -> None:
    done = run(*words, "--", "--max-num-seqs", "8")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"`{words[0]}` starts none" in done.stderr


def test_a_config_that_is_none_is_one_line_and_2(tmp_path: Path) -> None:
    file = tmp_path / "synthia.yaml"
    file.write_text("port: [1")
    done = run("serve", "--config", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"synthia-vllm: --config {file}: line 1, column ")
    assert done.stderr.count("\n") == 1


def test_vllms_options_follow_two_dashes() -> None:
    assert split_options(["--port", "1", "--", "--max-num-seqs", "8"]) == (["--port", "1"], ["--max-num-seqs", "8"])


def test_doctor_finds_what_would_stop_serve() -> None:
    done = run("doctor", "--model", "/nowhere", "--port", "0")
    assert done.returncode == 1
    assert "no such folder" in done.stdout
    assert run("doctor", "--model", "demo", "--port", "0").returncode == 0


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_the_docs_name_only_commands_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\s*make ([a-z0-9]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"`make ([a-z0-9]+)", text)) <= targets
    assert set(re.findall(r"synthia-vllm ([a-z]+)\b", text)) <= COMMANDS.keys()
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()


def test_the_exporter_wants_an_engine_and_a_key_where_others_reach_it() -> None:
    assert "--upstream" in run("exporter", "--port", "0").stderr
    done = run(
        "exporter", "--port", "0", "--host", "0.0.0.0", "--access.mode", "open", "--upstream", "http://127.0.0.1:1"
    )
    assert done.returncode == 2
    assert "--insecure" in done.stderr
