"""Takes the README's pictures of the status page from a real run: `python -m tests.web.screenshots`.

`synthia-vllm serve` with the demo model and keys, four users who ask for some minutes, and Chromium with a light
desktop and a dark phone.
"""

import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from synthia_vllm.free_ports import free_port
from tests.chromium_service import chromium_options
from tests.running import ROOT, Running, new_key

FOLDER = ROOT / "docs" / "images"
QUESTIONS = ("What is an orca?", "Name three rivers.", "Why is the sky blue?", "Write a short poem about the sea.")
USERS = {"alice": ("--weight", "3"), "bob": (), "carol": (), "nightly": ("--priority", "batch")}
DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 390, "height": 844}


def serve(folder: Path) -> Running:
    """The real server, with keys in the folder. Not started yet."""
    port = free_port()
    words = [sys.executable, "-m", "synthia_vllm", "serve", "--port", str(port), "--access.mode", "keys"]
    words += ["--engine.max-model-len", "4096", "--engine.kv-cache-gib", "1", "--fair.max-in-flight-requests", "6"]
    return Running(words, port, "/health", {"SYNTHIA_DATA": str(folder / "data")}, folder / "log", start_timeout=300)


def ask(url: str, key: str, over: threading.Event) -> None:
    """Streams, one after another, with pauses."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
        while not over.wait(random.expovariate(1)):
            messages = [{"role": "user", "content": random.choice(QUESTIONS)}]
            body = {"model": "synthia", "messages": messages, "max_tokens": random.randint(20, 120), "stream": True}
            client.post("/v1/chat/completions", json=body)


def take(page: Page, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=FOLDER / f"{name}.png")
    click.echo(f"{FOLDER / name}.png")


def pictures(browser: Browser, url: str, admin: str, user: str) -> None:
    """All of them."""
    keys = f"sessionStorage.setItem('synthia-admin', '{admin}'); sessionStorage.setItem('synthia-user', '{user}')"
    for scheme, size in (("light", DESKTOP), ("dark", PHONE)):
        context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
        context.add_init_script(keys)
        page = context.new_page()
        page.goto(url)
        page.locator("[data-replica]").wait_for()
        take(page, f"now-{scheme}")
        if scheme == "light":
            page.get_by_role("tab", name="Who").click()
            take(page, "who-light")
        page.get_by_role("tab", name="Try it").click()
        page.get_by_label("Longest reply").fill("60")
        page.get_by_label("Message").fill("What is an orca?")
        page.get_by_label("Message").press("Enter")
        page.locator("#figure-finish", has_text="length").or_(
            page.locator("#figure-finish", has_text="stop")
        ).first.wait_for(timeout=120_000)
        take(page, f"try-{scheme}")
        context.close()


@click.command()
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Of load before the pictures.")
def main(minutes: float) -> None:
    """Starts, loads, takes the pictures, stops."""
    over = threading.Event()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = serve(folder)
        try:
            server.start()
            for user, options in USERS.items():
                key = new_key(folder, user, *options)
                for _ in range(2):
                    threading.Thread(target=ask, args=(server.url, key, over), daemon=True).start()
            time.sleep(60 * minutes)
            admin, user = new_key(folder, "ops", "--admin"), new_key(folder, "dana")
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(**chromium_options())
                pictures(browser, server.url, admin, user)
                browser.close()
        finally:
            over.set()
            server.stop()


if __name__ == "__main__":
    main()
