"""The status page on the real engine."""

import re

import pytest
from playwright.sync_api import expect

from tests.chromium_service import Visit, figure, send
from tests.conftest import RunningServer
from tests.running import until

pytestmark = pytest.mark.e2e


def test_a_chat_with_the_real_model_and_its_charts(server: RunningServer, visit: Visit) -> None:
    page = visit.page
    page.goto(server.url)
    replica = page.locator('[data-replica="local"]')
    expect(replica).to_have_class(re.compile("good"))
    expect(page.locator("#health")).to_have_text("1 of 1 replica up")
    page.get_by_role("tab", name="Try it").click()
    expect(page.locator("#model")).to_have_value("synthia")  # once the list of models is there
    page.locator("#preset").select_option("Tree of Thoughts")
    send(page, "What is an orca?", 30)
    expect(page.locator("#figure-finish")).to_have_text(re.compile("stop|length"), timeout=60_000)
    assert page.locator("#said .assistant").inner_text()
    assert re.fullmatch(r"\d+ of 4,096 \([\d.]+ %\)", figure(page, "context"))
    assert "USER:" not in page.locator("#said .assistant").inner_text()
    send(page, "Tell me all about it.", 2000)
    expect(page.locator("#said .assistant").nth(1)).not_to_be_empty(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#figure-finish")).to_have_text(re.compile("stopped|stop"))
    page.get_by_role("tab", name="Now").click()
    until(lambda: page.locator("path[data-line=ttft_p99]").get_attribute("d"), "the chart has a line")
    assert {url.split("/")[2] for url in visit.asked if not url.startswith("data:")} == {server.url.split("/")[2]}
    assert visit.problems == []
