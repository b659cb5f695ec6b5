"""The request log: one line a request that was worth one."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from synthia_vllm.gateway.observers.log import RequestLog
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
