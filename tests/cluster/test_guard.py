"""The engine's door."""

import pytest
from starlette.types import Receive, Scope, Send

from synthia_vllm.cluster.guard import Guard, engine_key
from synthia_vllm.gateway.edge.replies import send_json
from synthia_vllm.settings import Settings
from tests.gateway.asgi import post


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    await send_json(200, {}, send)


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Basic right", "Bearer right2", "right"])
async def test_nobody_comes_in_without_the_key(given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    assert (await post(Guard(engine, key="right"), {}, headers=headers)).status == 401


async def test_a_gateway_does() -> None:
    assert (await post(Guard(engine, key="right"), {}, headers={"Authorization": "Bearer right"})).status == 200


def test_gateways_and_engines_of_one_secret_have_one_key() -> None:
    def of(secret: str) -> Settings:
        return Settings(access={"secret": secret})  # type: ignore[arg-type]

    assert engine_key(of("a")) == engine_key(of("a")) != engine_key(of("b"))
    assert "a-long-secret" not in engine_key(of("a-long-secret"))
