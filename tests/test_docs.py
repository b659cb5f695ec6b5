import importlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import measured
from synthia_vllm.cli.doctor import TCMALLOC_COST

ROOT = Path(__file__).parents[1]
NAMES = sorted(set(re.findall(r"`(synthia_vllm(?:\.\w+)+)`", (ROOT / "docs" / "architecture.md").read_text())))


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_page_names_what_exists(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("page", measured.PAGES, ids=lambda page: page.name)
def test_the_figures_quoted_are_the_ones_measured(page: Path) -> None:
    """Where this fails: `python -m benchmarks.measured`."""
    assert measured.filled(page.read_text()) == page.read_text()


def test_every_table_is_somewhere() -> None:
    pages = "".join(page.read_text() for page in measured.PAGES)
    assert set(re.findall(r"<!-- measured: ([\w-]+) -->", pages)) == set(measured.TABLES)
    assert pages.count("<!-- measured: ") == pages.count("<!-- end -->")


def test_the_command_writes_what_differs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: processes -->\n| old |\n<!-- end -->\nafter\n")
    monkeypatch.setattr(measured, "PAGES", (page,))
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    checked = CliRunner().invoke(measured.main, ["--check"])
    assert (checked.exit_code, "page.md" in checked.output, "| old |" in page.read_text()) == (1, True, True)
    assert CliRunner().invoke(measured.main, []).exit_code == 0
    assert (
        page.read_text()
        == f"before\n<!-- measured: processes -->\n{measured.TABLES['processes']()}\n<!-- end -->\nafter\n"
    )
    assert CliRunner().invoke(measured.main, ["--check"]).exit_code == 0


def test_the_readme_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_doctor_quotes_what_was_measured() -> None:
    report = measured.result("serving")
    without = report["ratios"]["completions, 64 streams: tokens/s, untuned / tuned"]["median"]
    assert f"{100 * (1 - without):.0f} %" in TCMALLOC_COST
