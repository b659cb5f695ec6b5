"""Both databases that the store is made for: a test that asks for `url` or `engine` runs on each."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.request import Exchange
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore
from tests.gateway.layers import make_request

SECRET = b"a secret of the tests"
MakeExchange = Callable[..., Exchange]


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("SYNTHIA_DATA", str(folder))
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> KeyStore:
    return KeyStore(engine, SECRET)


@pytest.fixture
def make_exchange() -> MakeExchange:
    """Builds an exchange that has ended: what was served unless `outcome` says otherwise."""

    def make(name: str, user: str = "alice", *, prompt: int = 10, generated: int = 5, **given: Any) -> Exchange:
        accepted = given.get("outcome", "finished") != "rejected"
        account = Account(user, key_id="k")
        request = make_request(account=account, id=name, prompt=prompt, most=100)
        usage = request.usage
        usage.generated, usage.accepted = generated, accepted
        usage.dispatched = time.perf_counter() if accepted else None
        fields: dict[str, Any] = {"model": "synthia", "status": 200, "outcome": "finished", **given}
        return Exchange(
            id=name,
            request_id=name,
            route="/v1/chat/completions",
            account=account,
            request=request,
            usage=usage,
            ended=time.perf_counter(),
            **fields,
        )

    return make
