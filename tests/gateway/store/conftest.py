"""Both databases that the store is made for: a test that asks for `url` or `engine` runs on each."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.call import Call
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore

SECRET = b"a secret of the tests"
MakeCall = Callable[..., Call]


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
def make_call() -> MakeCall:
    """Builds a call that has ended: what was served unless `outcome` says otherwise."""

    def make(name: str, user: str = "alice", *, prompt: int = 10, generated: int = 5, **given: object) -> Call:
        call = Call(id=name, request_id=name, route="/v1/chat/completions", account=Account(user, key_id="k"))
        call.model, call.prompt_tokens, call.generated = "synthia", prompt, generated
        call.status, call.outcome, call.max_generated = 200, "finished", 100
        for field, value in given.items():
            setattr(call, field, value)
        if call.outcome != "rejected":
            call.dispatch()
        call.ended = time.perf_counter()
        return call

    return make
