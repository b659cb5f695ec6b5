"""Headless Chromium, for tests of the status page."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.services import missing

# It may talk to the page's server only, and have no opinions of its own.
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_options() -> dict[str, Any]:
    """For Playwright's `launch`: the Chromium that is installed here, not one that it downloads."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return {"executable_path": path, "headless": True, "args": _OPTIONS}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; skips where there is none, unless SYNTHIA_REQUIRE_SERVICES=1.

    For one module, which may have no async tests: while Playwright is there, its event loop runs in this thread.
    """
    options = chromium_options()
    if options["executable_path"] is None:
        missing("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page and all that went wrong or out while it was looked at."""

    page: Page
    problems: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))


@pytest.fixture
def visit(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh browser profile; parametrize indirectly with options of `new_context`."""
    context = chromium.new_context(**getattr(request, "param", {}))
    context.set_default_timeout(20_000)
    found = Visit(context.new_page())
    found.watch()
    yield found
    context.close()


def send(page: Page, text: str, tokens: int) -> None:
    """A message of the page's chat, and how long the reply may be."""
    page.get_by_role("tab", name="Try it").click()
    page.get_by_label("Longest reply").fill(str(tokens))
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def figure(page: Page, name: str) -> str:
    return page.locator(f"#figure-{name}").inner_text()
