"""The admin's routes, of a whole gateway before an engine that does nothing."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.cli.keys import list_keys
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.secret_urls import reveal
from synthia_vllm.settings import Settings


class Operator:
    """Asks with an admin's key."""

    def __init__(self, gateway: Gateway, engine: NullEnginePort) -> None:
        self.gateway = gateway
        self.engine = engine
        self._key = gateway.keys.create("ops", admin=True)[1]

    async def ask(self, method: str, path: str, content: str | bytes | None = None, **given: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.gateway.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            headers = {"x-api-key": self._key, "content-type": "application/json", **given.pop("headers", {})}
            return await client.request(method, path, content=content, headers=headers, **given)

    async def new_key(self, **fields: Any) -> httpx.Response:
        return await self.ask("POST", "/admin/keys", json.dumps({"user": "bob", **fields}))


@pytest.fixture
async def operator(tmp_path: Path) -> AsyncIterator[Operator]:
    access = {"mode": "keys", "database": f"sqlite:///{tmp_path}/keys.db", "secret": "x" * 32}
    engine = NullEnginePort()
    async with Gateway(engine, Settings(access=access, log={"requests": False})) as gateway:  # type: ignore[arg-type]
        yield Operator(gateway, engine)


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is nine hours before UTC's."""
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "UTC-9")
        time.tzset()
        yield
    time.tzset()


def error(reply: httpx.Response) -> dict[str, Any]:
    """The error of a reply, in OpenAI's form."""
    found: dict[str, Any] = reply.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


@pytest.mark.parametrize(
    "moment",
    [
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00",
        "0001-01-01T00:00:00+14:00",
        "2001-01-01",
        "soon",
        "",
        "2099-13-01",
        1893456000,
        True,
        ["2099-01-01"],
    ],
)
async def test_an_end_that_is_no_moment_to_come_is_refused(operator: Operator, moment: Any) -> None:
    reply = await operator.new_key(expires=moment)
    assert reply.status_code == 400
    assert error(reply)["param"] == "expires"
    assert [row["user"] for row in (await operator.ask("GET", "/admin/keys")).json()] == ["ops"]


@pytest.mark.parametrize("moment", ["2099-01-31", "2099-01-31T00:00:00", "2099-01-31T02:00:00+02:00"])
async def test_a_time_without_an_offset_is_utc(operator: Operator, moment: str, tokyo: None) -> None:
    assert (await operator.new_key(expires=moment)).status_code == 201
    assert (await operator.ask("GET", "/admin/keys")).json()[1]["expires"] == 4073500800.0


@pytest.mark.parametrize("name", ["since", "until"])
async def test_usage_takes_the_same_moments(operator: Operator, name: str) -> None:
    assert (await operator.ask("GET", f"/admin/usage?{name}=2027-01-31T00:00:00")).status_code == 200
    for wrong in ("9999-12-31T23:59:59-14:00", "yesterday", "5"):
        reply = await operator.ask("GET", "/admin/usage", params={name: wrong})
        assert (reply.status_code, error(reply)["param"]) == (400, name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", 5),
        ("admin", "yes"),
        ("admin", 1),
        ("admin", None),
        ("weight", "2"),
        ("weight", True),
        ("weight", float("nan")),
        ("priority", 1),
        ("requests_per_minute", "5"),
        ("requests_per_minute", 5.0),
        ("tokens_per_minute", True),
        ("concurrent_requests", [1]),
        ("tokens_per_month", 10**400),
        ("models", []),
        ("models", ""),
        ("models", "synthia"),
        ("models", [""]),
        ("models", [" "]),
        ("models", ["a\0"]),
        ("models", [1]),
        ("models", {"synthia": True}),
        ("nonsense", 1),
    ],
)
async def test_a_value_of_another_type_makes_no_key(operator: Operator, field: str, value: Any) -> None:
    reply = await operator.new_key(**{field: value})
    assert reply.status_code == 400
    assert error(reply)["param"].startswith(field)
    assert len(operator.gateway.keys.list_keys()) == 1


@pytest.mark.parametrize("grace", ["5", True, -1, 10**12, None])
async def test_a_grace_of_another_type_rotates_nothing(operator: Operator, grace: Any) -> None:
    made = (await operator.new_key()).json()
    reply = await operator.ask("POST", f"/admin/keys/{made['id']}/rotate", json.dumps({"grace_s": grace}))
    assert (reply.status_code, error(reply)["param"]) == (400, "grace_s")
    assert len(operator.gateway.keys.list_keys()) == 2


@pytest.mark.parametrize("name", ["anonymous", "other", "\uff42\uff4f\uff42", "a b", ""])
async def test_a_name_that_is_taken_for_another_is_refused(operator: Operator, name: str) -> None:
    reply = await operator.new_key(user=name)
    assert (reply.status_code, error(reply)["param"]) == (400, "user")


async def test_what_is_stored_already_is_listed_whatever_it_is(
    operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    for moment in (253402351199.0, 1e300, -1e300, float("inf")):
        operator.gateway.keys.create("bob", expires=moment)
    assert (await operator.ask("GET", "/admin/keys")).status_code == 200
    url = reveal(operator.gateway.settings.access.database)
    for form in ("table", "json"):
        list_keys.main(["--database", str(url), "--format", form], standalone_mode=False)
    assert capsys.readouterr().out.count("Unix time") == 8


@pytest.mark.parametrize("path", ["/admin/keys/", "/admin/nope", "/admin/keys/a/b/c", "/admin/keys/%00/rotate"])
async def test_a_path_that_is_none_is_our_404_and_no_redirect(operator: Operator, path: str) -> None:
    method = "POST" if path.endswith("rotate") else "GET"
    reply = await operator.ask(method, path, headers={"host": "evil.example"})
    assert (reply.status_code, error(reply)["code"]) == (404, "not_found")
    assert "evil" not in reply.text


async def test_another_method_is_our_405_with_those_that_are_right(operator: Operator) -> None:
    reply = await operator.ask("DELETE", "/admin/users")
    assert (reply.status_code, error(reply)["code"], reply.headers["allow"]) == (405, "method_not_allowed", "GET")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[]", b"null", b'{"user": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"\\ud800": 1}']
)
async def test_a_body_that_is_no_object_is_a_400(operator: Operator, body: bytes) -> None:
    reply = await operator.ask("POST", "/admin/keys", body)
    assert reply.status_code == 400
    assert error(reply)["message"]


HELD = {"requests_per_minute": 5, "tokens_per_month": 1000, "models": ["synthia"], "weight": 2.0, "priority": "batch"}
FREE = {"requests_per_minute": None, "tokens_per_month": None, "models": None, "weight": 1.0, "priority": "interactive"}


async def user(operator: Operator) -> dict[str, Any]:
    """What holds for bob."""
    users: list[dict[str, Any]] = (await operator.ask("GET", "/admin/users")).json()
    (found,) = (row for row in users if row["name"] == "bob")
    return {name: found[name] for name in HELD}


async def test_null_unsets_a_limit_with_a_key_and_without(operator: Operator) -> None:
    await operator.new_key(**HELD)
    await operator.new_key(tokens_per_month=None)
    assert await user(operator) == HELD | {"tokens_per_month": None}
    reply = await operator.ask("PATCH", "/admin/users/bob", json.dumps(dict.fromkeys(HELD)))
    assert reply.status_code == 200
    assert await user(operator) == FREE


async def test_what_is_left_out_of_a_change_stays_and_its_keys_know_at_once(operator: Operator) -> None:
    key = (await operator.new_key(**HELD)).json()["key"]
    before = operator.gateway.keys.revision()
    reply = await operator.ask("PATCH", "/admin/users/bob", json.dumps({"requests_per_minute": 7}))
    assert {name: reply.json()[name] for name in HELD} == HELD | {"requests_per_minute": 7}
    assert operator.gateway.keys.revision() > before
    found = operator.gateway.keys.find(key)
    assert found is not None
    assert found.limits.requests_per_minute == 7


async def test_a_user_that_is_not_there_is_404_and_is_not_made(operator: Operator) -> None:
    reply = await operator.ask("PATCH", "/admin/users/nobody", '{"weight": 2}')
    assert (reply.status_code, error(reply)["code"]) == (404, "not_found")
    assert [row["name"] for row in (await operator.ask("GET", "/admin/users")).json()] == ["ops"]


ROUTES = [
    ("GET", "/admin/state", 200),
    ("GET", "/admin/live", 200),
    ("GET", "/admin/openapi.json", 200),
    ("GET", "/admin/keys", 503),
    ("POST", "/admin/keys", 503),
    ("POST", "/admin/keys/abcdefgh/rotate", 503),
    ("DELETE", "/admin/keys/abcdefgh", 503),
    ("GET", "/admin/users", 503),
    ("PATCH", "/admin/users/bob", 503),
    ("GET", "/admin/usage", 503),
    ("GET", "/admin/usage?by=day&since=2027-01-01", 503),
]


async def known(key: str) -> Account:
    """The admin's key is remembered."""
    return Account("ops", admin=True)


def lost(*_: Any) -> None:
    """As a driver tells that nobody answers."""
    raise OperationalError("SELECT", None, OSError("connection refused"))


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
async def test_a_lost_database_is_a_503_that_says_when_to_come_back(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int
) -> None:
    monkeypatch.setattr(operator.gateway.access, "lookup", known)
    monkeypatch.setattr(operator.gateway.keys.engine, "connect", lost)
    content = {"/admin/keys": '{"user": "bob"}', "/admin/users/bob": '{"weight": 2}'}.get(path)
    reply = await operator.ask(method, path, content)
    assert reply.status_code == status
    if status == 503:
        assert error(reply)["code"] == "overloaded"
        assert reply.headers["retry-after"] == "5"


async def test_every_route_of_the_admin_is_tried_with_a_lost_database(operator: Operator) -> None:
    paths = (await operator.ask("GET", "/admin/openapi.json")).json()["paths"]
    known = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    tried = {
        (method, path.partition("?")[0].replace("abcdefgh", "{key_id}").replace("bob", "{user}"))
        for method, path, _ in ROUTES
    }
    assert known == tried - {("GET", "/admin/openapi.json")}


@pytest.mark.parametrize(
    ("models", "warning"),
    [
        (None, None),
        (["null", "synthia"], None),
        (["synthia", "nope"], "not served now: nope; the models are null, synthia, synthia-tot"),
    ],
)
async def test_a_key_for_a_model_that_is_not_there_yet_is_made_with_a_warning(
    operator: Operator, models: list[str] | None, warning: str | None
) -> None:
    reply = await operator.new_key(models=models)
    assert reply.status_code == 201
    assert reply.json().get("warning") == warning
    (user,) = (row for row in (await operator.ask("GET", "/admin/users")).json() if row["name"] == "bob")
    assert user["models"] == models


async def test_a_key_is_made_without_a_warning_where_no_engine_tells_its_models(operator: Operator) -> None:
    operator.engine.faults.change({"dead": True})
    reply = await operator.new_key(models=["nope"])
    assert (reply.status_code, reply.json().keys()) == (201, {"id", "key"})


async def test_what_breaks_is_told_in_our_form(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator.gateway.keys, "list_users", lambda: 1 / 0)
    reply = await operator.ask("GET", "/admin/users")
    assert (reply.status_code, error(reply)["code"]) == (500, "internal_error")
