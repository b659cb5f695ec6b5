"""Pages of other websites, against a whole gateway that needs no keys, over real sockets."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.settings import Settings
from tests.gateway.live import exchange, serving

BODY = b'{"model":"synthia","prompt":"Hello","max_tokens":2}'
FOREIGN = [b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"127.0.0.1.evil.example", b"192.0.2.1"]


@contextmanager
def gateway(folder: Path, mode: str = "auto", **given: Any) -> Iterator[int]:
    access = {"mode": mode, "database": f"sqlite:///{folder}/keys.db", "secret": "x" * 32, **given.pop("access", {})}
    found = Gateway(NullEnginePort(), Settings(access=access, log={"requests": False}, **given))  # type: ignore[arg-type]
    with serving(found.app, beside=found) as port:
        yield port


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    named = {"hosts": ["Synthia.example.com", "192.0.2.7", "fd00::7"]}
    with gateway(tmp_path_factory.mktemp("open"), access=named, cors_origins=["https://chat.example.com"]) as port:
        yield port


def ask(port: int, path: bytes, host: bytes, *headers: bytes, body: bytes = BODY) -> tuple[int, Any]:
    method = b"GET" if path in (b"/v1/models", b"/ready", b"/", b"/metrics", b"/admin/live") else b"POST"
    body = b"" if method == b"GET" else body
    lines = [b"%b %b HTTP/1.1" % (method, path), b"host: " + host, b"content-length: %d" % len(body), *headers]
    got = exchange(port, b"\r\n".join([*lines, b"connection: close", b"", b""]) + body)
    head, _, found = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(found) if b"application/json" in head else found


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/models", b"/", b"/metrics", b"/admin/live", b"/nothing"])
def test_a_page_of_a_foreign_name_is_answered_nothing(port: int, host: bytes, path: bytes) -> None:
    status, told = ask(port, path, host)
    assert (status, told["error"]["code"], told["error"]["param"]) == (421, "misdirected_request", "Host")
    assert f"--access.hosts {host.decode().removesuffix(':8000')}" in told["error"]["message"]


def test_the_refusal_has_the_form_of_the_api_that_was_asked(port: int) -> None:
    status, told = ask(port, b"/v1/messages", b"evil.example")
    assert (status, told["type"], told["error"]["type"]) == (421, "error", "invalid_request_error")


@pytest.mark.parametrize(
    "host",
    [
        b"localhost", b"LocalHost:8000", b"localhost.", b"127.0.0.1:1", b"127.1.2.3", b"[::1]:8000", b"[::1]",
        b"synthia.example.com", b"SYNTHIA.example.com:443", b"192.0.2.7:8000", b"[fd00::7]",
    ],
)  # fmt: skip
def test_this_machines_own_names_and_those_that_were_set_are_answered(port: int, host: bytes) -> None:
    assert ask(port, b"/v1/completions", host)[0] == 200


def test_probes_ask_by_any_name(port: int) -> None:
    assert ask(port, b"/ready", b"10.0.0.3:8000")[0] == 200


@pytest.mark.parametrize("origin", [b"https://evil.example", b"null", b"http://localhost.evil.example", b"nonsense"])
def test_a_page_of_another_website_can_make_the_server_do_nothing(port: int, origin: bytes) -> None:
    """Without reading: a form, or a text that needs no preflight."""
    status, told = ask(port, b"/v1/completions", b"localhost", b"origin: " + origin, b"content-type: text/plain")
    assert (status, told["error"]["code"]) == (403, "foreign_origin")
    assert "--cors-origins" in told["error"]["message"]


@pytest.mark.parametrize("origin", [b"http://localhost:8000", b"http://127.0.0.1", b"https://chat.example.com"])
def test_our_own_page_and_those_of_origins_that_were_set_may_ask(port: int, origin: bytes) -> None:
    assert ask(port, b"/v1/completions", b"localhost", b"origin: " + origin)[0] == 200


def test_where_keys_are_needed_any_name_will_do(tmp_path: Path) -> None:
    with gateway(tmp_path, "keys") as port:
        status, _ = ask(port, b"/v1/completions", b"synthia.example.com", b"origin: https://chat.example.com")
        assert status == 401  # asked for its key


def test_names_that_are_set_hold_with_keys_too(tmp_path: Path) -> None:
    with gateway(tmp_path, "keys", access={"hosts": ["synthia.example.com"]}) as port:
        assert ask(port, b"/v1/completions", b"evil.example")[0] == 421
        status, _ = ask(port, b"/v1/completions", b"synthia.example.com", b"origin: https://chat.example.com")
        assert status == 401


def test_a_request_without_a_name_is_no_browsers(port: int) -> None:
    got = exchange(port, b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200")
