"""The operators' pages: what they name exists, and a README is a screen."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.generate import FOLDER
from synthia_vllm.cli import COMMANDS, cli
from synthia_vllm.settings import Settings
from tests.running import ROOT

_SCREEN = 45  # lines
READMES = sorted(FOLDER.rglob("README.md"))
PAGES = [*READMES, ROOT / "docs" / "operations.md", ROOT / "docs" / "security.md"]
_NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
_GROUPS = ("engine", "access", "limits", "fair", "cluster", "scaling", "replicas", "deploy", "slo", "log")


def folders() -> list[Path]:
    return [path for path in FOLDER.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))]


@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.name)
def test_each_folder_has_a_readme_of_a_screen(folder: Path) -> None:
    if folder.name in ("prometheus", "grafana"):  # theirs are the comments in their files
        return
    assert len((folder / "README.md").read_text().splitlines()) <= _SCREEN


@pytest.mark.parametrize("page", PAGES, ids=_NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=_NAMES)
def test_commands_exist(page: Path) -> None:
    for words in re.findall(r"(?:^|[`( /])synthia-vllm ([a-z]+(?: [a-z-]+)?)", page.read_text(), re.MULTILINE):
        command, _, rest = words.partition(" ")
        assert command in COMMANDS, words
        if rest and not rest.startswith("-") and command in ("cluster", "deploy", "keys"):
            help_text = CliRunner().invoke(cli, [command, "--help"]).output
            assert re.search(rf"^  {rest}\b", help_text, re.MULTILINE), words


@pytest.mark.parametrize("page", PAGES, ids=_NAMES)
def test_settings_exist(page: Path) -> None:
    dotted = re.findall(rf"`(?:--)?((?:{'|'.join(_GROUPS)})\.[a-z][a-z_-]*)", page.read_text())
    for name in dotted:
        group, _, field = name.replace("-", "_").partition(".")
        if field == "yaml":  # a file
            continue
        assert field in type(getattr(Settings(), group)).model_fields, name
