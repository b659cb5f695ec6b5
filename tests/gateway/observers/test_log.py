"""The request log: one line a request that was worth one."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from synthia_vllm.gateway.observers.log import RequestLog, configure_logging
from synthia_vllm.settings import LogSettings
from tests.gateway.layers import make_exchange, make_request


def logged(*, first_sent: float | None = None, settings: LogSettings | None = None, **given: Any) -> list[Any]:
    exchange = make_exchange(make_request())
    exchange.status, exchange.outcome = 200, "finished"
    exchange.usage.first_token = exchange.arrived + 0.1
    if first_sent is not None:
        exchange.first_sent = exchange.arrived + first_sent
    for name, value in given.items():
        setattr(exchange, name, value)
    with capture_logs() as lines:
        RequestLog(settings or LogSettings()).ended(exchange)
    return lines


def test_a_streams_first_token_is_the_one_that_was_sent() -> None:
    (line,) = logged(first_sent=0.5)
    assert (line["time_to_first_token_s"], line["outcome"], line["status"]) == (0.5, "finished", 200)


def test_of_a_whole_reply_no_first_token_is_told() -> None:
    (line,) = logged()
    assert "time_to_first_token_s" not in line


@pytest.mark.parametrize("route", ["/health", "/ready", "/metrics", "/sd", "/admin/live"])
def test_what_is_polled_is_no_line(route: str) -> None:
    assert logged(route=route) == []


def test_a_refused_look_at_the_live_view_is_a_line() -> None:
    (line,) = logged(route="/admin/live", status=401, outcome="rejected", reason="unauthorized")
    assert (line["status"], line["reason"]) == (401, "unauthorized")


def test_texts_are_logged_only_where_that_is_switched_on() -> None:
    (silent,) = logged(body=b"a secret")
    (line,) = logged(body=b"a secret", settings=LogSettings(texts=True))
    assert "body" not in silent
    assert line["body"] == "a secret"
    assert logged(settings=LogSettings(requests=False)) == []


@pytest.fixture
def as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize(
    "character", ["\0", "\x1b", "\x9b", "\r", "\n", "\x7f", "\u2028", "\u202e", "\ud800"], ids=ascii
)
def test_what_a_client_sends_is_one_line_that_no_terminal_obeys(
    form: Any, character: str, as_before: None, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogSettings(format=form))
    exchange = make_exchange(make_request())
    exchange.route = f"/a{character}[31mforged"
    exchange.model = f"b {character}"
    exchange.body = f"c{character}d".encode(errors="replace")
    RequestLog(LogSettings(texts=True)).ended(exchange)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert "[31mforged" in text


@pytest.mark.parametrize("gone", ["full", "closed"])
def test_a_log_that_nothing_can_be_written_to_fails_no_request(
    gone: str, as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full:
        if gone == "closed":
            full.close()
        monkeypatch.setattr("sys.stderr", full)
        configure_logging(LogSettings(format="json"))
        for _ in range(3):
            RequestLog(LogSettings()).ended(make_exchange(make_request()))
            structlog.get_logger().error("a" * 100_000)
        monkeypatch.undo()
        with suppress(OSError):  # what is left in its buffer
            full.close()


def test_a_traceback_keeps_its_lines_and_nothing_else(as_before: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(format="console"))
    try:
        int("a\x1b[31m")
    except ValueError:
        structlog.get_logger().exception("failed")
    text = capsys.readouterr().err
    assert "\x1b" not in text
    assert text.splitlines()[-1].startswith("ValueError: invalid literal")
