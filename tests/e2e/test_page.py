"""The status page on the real engine."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.chromium_service import Visit, figure, send
from tests.conftest import RunningServer
from tests.running import until

pytestmark = pytest.mark.e2e


def ask(page: Page, text: str, tokens: int) -> Locator:
    """Sends this until the small model has something to say: the reply, which may still grow."""
    for _ in range(5):
        if (reply := sent(page, text, tokens)) is not None:
            return reply
    raise AssertionError("five empty replies")


def sent(page: Page, text: str, tokens: int) -> Locator | None:
    """None where the reply ended empty."""
    replies, stop = page.locator("#said .assistant"), page.get_by_role("button", name="Stop")
    before = replies.count()
    send(page, text, tokens)

    def said() -> bool:
        return any(replies.all_inner_texts()[before:])

    until(lambda: said() or stop.is_disabled(), "a reply or its end")
    return replies.nth(before) if said() else None


def test_a_chat_with_the_real_model_and_its_charts(server: RunningServer, visit: Visit) -> None:
    page = visit.page
    page.goto(server.url)
    replica = page.locator('[data-replica="local"]')
    expect(replica).to_have_class(re.compile("good"))
    expect(page.locator("#health")).to_have_text("1 of 1 replica up")
    page.get_by_role("tab", name="Try it").click()
    expect(page.locator("#model")).to_have_value("synthia")  # once the list of models is there
    page.locator("#preset").select_option("Tree of Thoughts")
    reply = ask(page, "What is an orca?", 30)
    expect(page.locator("#figure-finish")).to_have_text(re.compile("stop|length"), timeout=60_000)
    assert re.fullmatch(r"\d+ of 4,096 \([\d.]+ %\)", figure(page, "context"))
    assert "USER:" not in reply.inner_text()
    ask(page, "Tell me all about it.", 2000)
    page.get_by_role("button", name="Stop").evaluate("button => button.click()")  # nothing, if the reply has ended
    expect(page.locator("#figure-finish")).to_have_text(re.compile("stopped|stop"))
    page.get_by_role("tab", name="Now").click()
    until(lambda: page.locator("path[data-line=ttft_p99]").get_attribute("d"), "the chart has a line")
    assert {url.split("/")[2] for url in visit.asked if not url.startswith("data:")} == {server.url.split("/")[2]}
    assert visit.problems == []
