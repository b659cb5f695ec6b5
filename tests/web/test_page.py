"""The status page in headless Chromium, on a real server in front of null engines."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Route, expect

from synthia_vllm import __version__
from tests.chromium_service import Visit, figure, send
from tests.running import new_key, until
from tests.web.conftest import Site

ORCA = [{"role": "user", "content": "What is an orca?"}]
PHONE = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
SERIOUS = ("serious", "critical")


def engine_gauge(site: Site, name: str) -> float:
    pages = [httpx.get(f"{engine.url}/metrics").text for engine in site.engines if engine.process]
    return sum(float(found[1]) for text in pages if (found := re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.M)))


# What the null engine's replies are made of.
WORD = re.compile(r"\b[0-9a-f]{4}\b")


def test_a_chat_streams_and_tells_its_figures(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    send(page, "What is an orca?", 60)
    reply = page.locator("#said .assistant")
    expect(reply).to_contain_text(WORD)
    expect(reply).to_have_class(re.compile("busy"))  # some is there, and it is not the end
    early = len(reply.inner_text())
    expect(page.locator("#figure-finish")).to_have_text("length")
    assert len(reply.inner_text()) > early
    assert len(WORD.findall(reply.inner_text())) == 60
    assert re.fullmatch(r"[\d.]+ (ms|s)", figure(page, "ttft"))
    assert re.fullmatch(r"[\d.]+ tokens/s", figure(page, "speed"))
    assert figure(page, "tokens") == "60 tokens"
    assert re.fullmatch(r"\d+ of 131,072 \([\d.]+ %\)", figure(page, "context"))
    assert re.fullmatch(r"[0-9a-f]{32}", figure(page, "id"))
    send(page, "And a whale?", 3)
    expect(page.locator("#figure-tokens")).to_have_text("3 tokens")
    assert page.locator("#said .assistant").count() == 2
    assert visit.problems == []


def test_a_reply_goes_on_when_its_gateway_was_killed_and_is_back(remembering: Site, visit: Visit) -> None:
    server, page = remembering.server, visit.page
    page.goto(remembering.url)
    send(page, "What is an orca?", 120)
    reply = page.locator("#said .assistant")
    expect(reply).to_contain_text(WORD)
    server.kill()
    expect(page.locator("#figure-finish")).to_have_text("reconnecting…")
    server.start()
    expect(page.locator("#figure-finish")).to_have_text("length", timeout=60_000)
    expect(page.locator("#figure-tokens")).to_have_text("120 tokens")
    words = WORD.findall(reply.inner_text())
    assert len(words) == len(set(words)) == 120  # the null engine's differ
    assert page.locator("#failure").inner_text() == ""


def test_a_reply_that_can_not_go_on_says_so(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionreset"))
    send(page, "What is an orca?", 60)
    expect(page.locator("#figure-finish")).to_have_text("failed")
    expect(page.locator("#failure")).not_to_be_empty()


def test_stop_stops_the_engine_too(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    send(page, "Tell me all.", 4000)
    expect(page.locator("#said .assistant")).to_contain_text(WORD)
    assert engine_gauge(site, "num_requests_running") == 1
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#figure-finish")).to_have_text("stopped")
    until(lambda: engine_gauge(site, "num_requests_running") == 0, "the engine runs nothing")
    length = len(page.locator("#said .assistant").inner_text())
    assert 0 < length < 4000
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert visit.problems == []


def test_a_preset_is_sent_as_the_system_message(site: Site, visit: Visit) -> None:
    page = visit.page
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.goto(site.url)
    page.get_by_role("tab", name="Try it").click()
    page.locator("#preset").select_option("Tree of Thoughts")
    send(page, "One", 2)
    expect(page.locator("#figure-finish")).to_have_text("length")
    page.locator("#preset").select_option("Own text")
    page.get_by_label("Own system prompt").fill("You are an orca.")
    send(page, "Two", 2)
    expect(page.locator("#said .assistant")).to_have_count(2)
    expect(page.locator("#figure-finish")).to_have_text("length")
    page.get_by_role("button", name="New chat").click()
    page.locator("#preset").select_option("None")
    send(page, "Three", 2)
    expect(page.locator("#figure-finish")).to_have_text("length")
    assert (bodies[0]["model"], bodies[0]["messages"]) == ("synthia-tot", [{"role": "user", "content": "One"}])
    assert [message["role"] for message in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][0]["content"] == "You are an orca."
    assert bodies[2]["messages"] == [{"role": "user", "content": "Three"}]


def test_what_is_said_is_shown_as_text_and_never_as_markup(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    send(page, "<img src=x onerror=alert(1)><b>bold</b>", 2)
    expect(page.locator("#said .user")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#said img, #said b").count() == 0
    assert visit.problems == []


def test_charts_move_with_the_load(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    line = page.locator("path[data-line=generation_per_s]")
    body = {"model": "null", "messages": ORCA, "max_tokens": 200, "stream": True}
    before = line.get_attribute("d")
    httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    until(lambda: line.get_attribute("d") != before, "the line changes")
    heights = until(
        lambda: set(re.findall(r"[ML][\d.]+ ([\d.]+)", line.get_attribute("d") or "")) - {"100.00"},
        "the line leaves zero",
    )
    assert all(0 <= float(height) < 100 for height in heights)
    for name in ("ttft_p50", "queue_p99", "engine_p50", "itl_p99"):
        until(lambda name=name: page.locator(f"path[data-line={name}]").get_attribute("d"), f"{name} has a line")
    expect(page.get_by_role("img", name=re.compile("^To the first token, latest: p50 .*s, p99 .*s"))).to_be_visible()
    page.get_by_role("tab", name="Who").click()
    row = page.get_by_role("row", name=re.compile("anonymous"))
    expect(row).to_be_visible()
    assert visit.problems == []


def test_a_share_is_rounded_to_nothing_and_all_only_where_it_is(site: Site, visit: Visit) -> None:
    visit.page.goto(site.url)
    shares = [0, 1e-6, 0.0004, 0.004, 0.0994, 0.5, 0.9, 0.95, 0.996, 0.9996, 0.99994, 0.99999, 1, 1.05]
    assert visit.page.evaluate("shares => shares.map(percent)", shares) == [
        *("0 %", "< 0.01 %", "0.04 %", "0.4 %", "9.9 %", "50 %", "90 %", "95 %", "99.6 %", "99.96 %", "99.99 %"),
        *("> 99.99 %", "100 %", "105 %"),
    ]


def tile(page: Page, name: str) -> Locator:
    return page.locator("#tiles > div").filter(has=page.locator("dt", has_text=re.compile(f"^{name}")))


def doctor(page: Page, change: Callable[[dict[str, Any]], None]) -> None:
    """Shows the page the real live view with some of it changed."""

    def answer(route: Route) -> None:
        reply = route.fetch()
        live = reply.json()
        change(live)
        route.fulfill(response=reply, json=live)

    page.route("**/admin/live", answer)


def test_it_says_which_server_it_is_and_what_came_of_the_last_requests(site: Site, visit: Visit) -> None:
    def change(live: dict[str, Any]) -> None:
        live["server"] |= {"model": "/models/Synthia-v3.0-11B/", "uptime_s": 93_784.0}
        live["recent"] |= {"requests": 1000, "failed": 4, "refused": 120, "preemptions": 7}
        live["recent"] |= {"prefix_cache_queries": 250, "prefix_cache_hits": 249}

    page = visit.page
    doctor(page, change)
    page.goto(site.url)
    expect(page.locator("#about")).to_have_text(f"Synthia-v3.0-11B · synthia-vllm {__version__} · up for 1 d 2 h")
    expect(tile(page, "Errors, 5.min")).to_contain_text("0.4 % of 1,000 requests")
    expect(tile(page, "Refused, 5.min")).to_contain_text("12 % of 1,000 requests")
    expect(tile(page, "Prefix cache hits")).to_contain_text("99.6 %")
    expect(tile(page, "Preemptions")).to_contain_text("7")
    expect(page.locator("#burn")).to_contain_text("Error budget: 1 % of all requests may miss their targets.")
    assert visit.problems == []


def test_a_request_that_fails_reaches_its_tile(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    expect(page.locator("#about")).to_have_text(re.compile(rf"^null · synthia-vllm {__version__} · up for \d+ (s|min)"))
    expect(tile(page, "Errors").locator("dd")).to_have_text(re.compile("^(0 %|–)"), timeout=30_000)
    for engine in site.engines:
        httpx.post(f"{engine.url}/fault", json={"status": 500}).raise_for_status()
    try:
        body = {"model": "null", "messages": ORCA, "max_tokens": 2}
        assert httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=60).status_code == 502
    finally:
        for engine in site.engines:
            httpx.post(f"{engine.url}/fault", json={"status": None}).raise_for_status()
    expect(tile(page, "Errors").locator("dd")).not_to_have_text(re.compile("^(0 %|–)"), timeout=30_000)
    expect(tile(page, "Refused").locator("dd")).to_have_text(re.compile("^0 %"))
    expect(page.locator("#health")).to_have_text("2 of 2 replicas up", timeout=60_000)
    assert visit.problems == []


def test_charts_of_latencies_show_their_targets(site: Site, visit: Visit) -> None:
    def change(live: dict[str, Any]) -> None:
        live["slo"]["targets"] = {
            "interactive": {"ttft_s": 0.5, "itl_s": 9.0, "e2e_s": None},
            "batch": {"ttft_s": 1.0, "itl_s": 9.0, "e2e_s": None},
        }
        points = len(live["history"]["at"])
        live["history"] |= {f"{name}_{q}": [0.4] * points for name in ("ttft", "itl") for q in ("p50", "p99")}

    page = visit.page
    doctor(page, change)
    page.goto(site.url)
    expect(page.locator("path[data-line=ttft_p50][d^=M]")).to_be_attached(timeout=30_000)
    first = page.locator("figure", has_text="To the first token")
    expect(first.locator(".target")).to_have_text(["SLO 500 ms", "SLO, batch 1.00 s"])
    assert [line.get_attribute("y1") for line in first.locator("[data-slo]").all()] == ["50", "0"]
    # Far above the lines: at the top, with an arrow.
    between = page.locator("figure", has_text="Between tokens")
    expect(between.locator(".target")).to_have_text("SLO 9.00 s ↑")
    assert [line.get_attribute("y1") for line in between.locator("[data-slo]").all()] == ["0"]
    assert page.locator("[data-slo]").count() == 3
    expect(page.get_by_role("img", name=re.compile("^To the first token, .*; SLO 500 ms; "))).to_be_visible()
    assert visit.problems == []


def test_it_talks_to_its_own_server_only(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    send(page, "Hello", 5)
    expect(page.locator("#figure-finish")).to_have_text("length")
    assert {url.split("/")[2] for url in visit.asked if not url.startswith("data:")} == {site.url.split("/")[2]}
    blocked = page.evaluate("fetch('http://127.0.0.2:9/').then(() => false, () => true)")
    assert blocked
    assert any("Content Security Policy" in problem for problem in visit.problems)


def test_keys_are_asked_for_once_and_kept_for_the_tab(locked_site: Site, visit: Visit) -> None:
    page = visit.page
    admin, user = new_key(locked_site.folder, "ops", "--admin"), new_key(locked_site.folder, "alice")
    page.goto(locked_site.url)
    expect(page.get_by_label("Admin key")).to_be_visible()
    assert page.locator("[data-replica]").count() == 0
    page.get_by_label("Admin key").fill(admin)
    page.get_by_role("button", name="Open").click()
    expect(page.locator("[data-replica]")).to_have_count(2)
    page.get_by_role("tab", name="Try it").click()
    page.get_by_label("User key").fill(user)
    page.get_by_role("button", name="Open").click()
    send(page, "Hello", 5)
    expect(page.locator("#figure-finish")).to_have_text("length")
    page.reload()
    expect(page.get_by_label("Message")).to_be_visible()
    page.get_by_role("tab", name="Who").click()
    expect(page.get_by_role("row", name=re.compile("alice"))).to_be_visible()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert visit.problems == []
    page.get_by_role("button", name="Forget the keys").click()
    expect(page.get_by_label("Admin key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_of_the_other_kind_or_none_is_told(locked_site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(locked_site.url)
    page.get_by_label("Admin key").fill("sk-synthia-nothing")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#lock-admin [role=alert]")).to_have_text("No such key here, or no longer.")
    page.get_by_label("Admin key").fill(new_key(locked_site.folder, "bob"))
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#lock-admin [role=alert]")).to_contain_text("a user's key")
    send(page, "Hello", 5)
    expect(page.locator("#figure-finish")).to_have_text("length")


@pytest.mark.parametrize("visit", [{"color_scheme": "light"}, PHONE], indirect=True, ids=["light", "dark-phone"])
def test_it_can_be_used_by_all(site: Site, locked_site: Site, visit: Visit) -> None:
    """axe-core finds nothing serious, and nothing is wider than the screen."""
    page = visit.page
    page.goto(site.url)
    expect(page.locator("[data-replica]")).to_have_count(2)
    send(page, "Hello", 5)
    expect(page.locator("#figure-finish")).to_have_text("length")
    for view in ("now", "who", "try", "locked"):
        page.goto(f"{site.url}/#{view}" if view != "locked" else locked_site.url)
        expect(page.locator("#health")).not_to_have_text("connecting")
        found = Axe().run(page).response["violations"]
        serious = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found if one["impact"] in SERIOUS]
        assert serious == [], view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


def test_the_keyboard_is_enough(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    page.get_by_role("tab", name="Now").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name="Try it")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Try it")).to_be_visible()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "message":
            break
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#said .assistant")).to_contain_text(WORD)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "stop":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#figure-finish")).to_have_text("stopped")


def test_a_dead_replica_turns_red_and_comes_back(site: Site, visit: Visit) -> None:
    page, engine = visit.page, site.engines[0]
    page.goto(site.url)
    replica = page.locator(f'[data-replica="127.0.0.1:{engine.port}"]')
    expect(replica).to_have_class(re.compile("good"), timeout=20_000)
    calm = replica.evaluate("element => getComputedStyle(element).backgroundColor")
    engine.kill()
    expect(replica).to_have_class(re.compile("bad"), timeout=30_000)
    assert replica.locator(".state").inner_text() in ("down", "no answer")
    red, green, blue = map(int, re.findall(r"\d+", replica.evaluate("e => getComputedStyle(e).borderTopColor"))[:3])
    assert red > 2 * max(green, blue)
    assert replica.evaluate("element => getComputedStyle(element).backgroundColor") != calm
    expect(page.locator("#health")).to_have_text("1 of 2 replicas up")
    expect(page.locator("#say")).to_contain_text(str(engine.port))
    engine.start()
    expect(replica).to_have_class(re.compile("good"), timeout=30_000)
    assert visit.problems == []


def test_nothing_of_engines_is_shown_while_none_is_up(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    body = {"model": "null", "messages": ORCA, "max_tokens": 40, "stream": True}
    httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    latest = page.locator("figure", has_text="To the first token").locator(".legend")
    expect(latest).to_have_text(re.compile(r"^p50[\d.]+ m?sp99[\d.]+ m?s$"), timeout=30_000)
    expect(tile(page, "Generated")).to_contain_text("tokens/s")
    try:
        for engine in site.engines:
            engine.kill()
        for name in ("Generated", "Prompts", "Running", "Prefix cache hits", "Preemptions"):
            expect(tile(page, name).locator("dd")).to_contain_text("no replica is up", timeout=60_000)
        expect(latest).to_have_text("p50–p99–no replica is up")
        expect(page.locator(".legend", has_text="no replica is up")).to_have_count(6)
    finally:
        for engine in site.engines:
            engine.start()
    expect(tile(page, "Generated")).to_contain_text("tokens/s", timeout=60_000)
    expect(page.locator("#health")).to_have_text("2 of 2 replicas up", timeout=60_000)
    assert visit.problems == []


def test_a_server_that_is_gone_is_told(site: Site, visit: Visit) -> None:
    page = visit.page
    page.goto(site.url)
    expect(page.locator("[data-replica]")).to_have_count(2)
    page.context.set_offline(True)
    expect(page.locator("#health")).to_have_text("no connection")
    page.context.set_offline(False)
    expect(page.locator("#health")).to_have_text("2 of 2 replicas up")
