"""Each row of what these pages promise has a test by name, and it is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("cluster.md", "security.md")


def rows(page: str) -> list[list[str]]:
    """The cells of each row of each table, the heads left out."""
    found: list[list[str]] = []
    head = True
    for line in (ROOT / "docs" / page).read_text().splitlines():
        if not line.startswith("|"):
            head = True
        elif set(line) <= set("|- "):
            head = False
        elif not head:
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


ROWS = [pytest.param(row, id=row[0][:40]) for page in PAGES for row in rows(page)]


@pytest.fixture(scope="module")
def tests() -> set[str]:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        }
    return found


def test_the_pages_have_tables() -> None:
    assert all(rows(page) for page in PAGES)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_its_tests(row: list[str], tests: set[str]) -> None:
    named = set(re.findall(r"`(test_\w+)`", row[-1]))
    assert named, "none is named"
    assert named - tests == set()
