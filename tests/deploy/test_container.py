"""The Dockerfile by hadolint, and what it copies."""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.container import dockerfile
from tests.running import ROOT

DOCKERFILE = ROOT / "deploy" / "container" / "Dockerfile"
TEXT = DOCKERFILE.read_text()
COPIED = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE)]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", sorted({name for names in COPIED for name in names}))
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    path = ROOT / name
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    assert files
    for file in files:
        shown = str(file.relative_to(ROOT))
        assert any(fnmatch.fnmatch(shown, pattern.replace("**", "*")) for pattern in allowed), shown


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_change_of_code_installs_no_package_anew(target: str) -> None:
    stage = TEXT.partition(f"AS build-{target}\n")[2].partition("\nFROM ")[0]
    assert stage.index("--requirement requirements") < stage.index("COPY synthia_vllm")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_without_rights(target: str) -> None:
    stage = TEXT.partition(f"FROM runtime AS {target}\n")[2].partition("\nFROM ")[0]
    assert re.findall(r"^USER (.+)$", stage, re.MULTILINE) == ["10001:10001"]


def test_signals_reach_the_server() -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", TEXT, re.MULTILINE)
    assert entry.startswith('["/usr/bin/tini", "--", ')


def test_no_secret_is_an_argument_of_the_build() -> None:
    assert not re.findall(r"^(?:ARG|ENV) .*(?:KEY|SECRET|TOKEN|PASSWORD)", TEXT, re.MULTILINE)
    assert not Path(ROOT / "deploy" / "container" / "secrets").exists()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_check_chroot_reads_all_instructions(target: str) -> None:
    stages = dockerfile.read(DOCKERFILE)
    instructions = [one for stage in dockerfile.chain(stages, target) for one in stage.instructions]
    assert dockerfile.chain(stages, target)[0].base == "${BASE}"
    assert {word for word, _ in instructions} <= {
        *("RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD"),
        *("SHELL", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ARG", "LABEL"),
    }
    environment = [dockerfile.variables(text) for word, text in instructions if word == "ENV"]
    assert environment[0]["SYNTHIA_DATA"] == "/data"
