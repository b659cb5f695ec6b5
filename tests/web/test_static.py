import re

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.routes import Routes
from synthia_vllm.prompt import SYSTEM_PROMPTS
from synthia_vllm.settings import Settings
from synthia_vllm.web.page import StatusPage, content_security_policy


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


UPSTREAM = PlainTextResponse("upstream's own")
PAGE = StatusPage(keys_required=True)


async def test_the_page_is_at_the_root_and_nowhere_else() -> None:
    async with client(Routes(UPSTREAM, methods={}, pages={"/": PAGE})) as http:
        got = await http.get("/")
        assert (got.status_code, got.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert got.headers["content-length"] == str(len(got.content))
        head = await http.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
        assert head.headers["x-synthia-keys"] == "required"
        assert (await http.post("/")).status_code == 405
        assert (await http.get("/index.html")).status_code == 404


async def test_a_page_that_is_known_is_not_sent_again() -> None:
    async with client(Routes(UPSTREAM, methods={}, pages={"/": PAGE})) as http:
        first = await http.get("/")
        again = await http.get("/", headers={"If-None-Match": f'W/"other", {first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(("page", "status"), [(True, 200), (False, 404)])
async def test_one_setting_turns_it_off(
    page: bool, status: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHIA_DATA", str(tmp_path))
    gateway = Gateway(NullEnginePort(), Settings(page=page))
    async with client(gateway.app) as http:
        assert (await http.get("/")).status_code == status


def test_only_what_is_in_the_page_may_run() -> None:
    policy = dict(part.split(" ", 1) for part in content_security_policy(PAGE.body.decode()).split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", policy["style-src"])
    assert "unsafe" not in str(policy)


def test_nothing_is_fetched_from_elsewhere() -> None:
    html = PAGE.body.decode()
    assert not re.findall(r'(?:src|href|action)="(?!data:)', html)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert " style=" not in html  # the policy would drop it


def test_the_preset_is_the_cards() -> None:
    assert SYSTEM_PROMPTS["tot"] in PAGE.body.decode()


@pytest.mark.parametrize(("mode", "status"), [("open", 200), ("keys", 401)])
async def test_the_live_view_is_open_where_no_keys_are_asked_for(
    mode: str, status: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHIA_DATA", str(tmp_path))
    gateway = Gateway(NullEnginePort(), Settings.model_validate({"access": {"mode": mode}}))
    async with client(gateway.app) as http:
        assert (await http.get("/admin/live")).status_code == status
        assert (await http.get("/")).headers["x-synthia-keys"] == ("required" if mode == "keys" else "none")
        for path in ("/admin/keys", "/admin/state", "/admin/live/", "/admin/usage"):
            assert (await http.get(path)).status_code == 401
