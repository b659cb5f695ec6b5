"""Requests made up from OpenAPI documents, at the whole gateway behind a real uvicorn: no 5xx may be ours.

The engines' routes are described by vLLM's own request classes: what clients of vLLM send.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from synthia_vllm.api.openapi import document
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.admin import build_admin
from synthia_vllm.gateway.apis import ANSWERING, GENERATING
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.own_usage import build_own_usage
from synthia_vllm.settings import AccessSettings, Settings
from tests.gateway.live import serving

EXAMPLES = int(os.environ.get("SYNTHIA_FUZZ_EXAMPLES", "25"))
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
KINDS = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": AnthropicMessagesRequest,
    "/v1/messages/count_tokens": AnthropicCountTokensRequest,
}


def described() -> FastAPI:
    """An app for its OpenAPI document alone."""
    app = FastAPI()

    def describe(path: str, kind: Any) -> None:
        @app.post(path)
        async def route(request: kind) -> None: ...

    for path, kind in KINDS.items():
        describe(path, kind)

    @app.get("/v1/models")
    async def models() -> None: ...

    @app.get("/v1/models/{name}")
    async def model(name: str) -> None: ...

    return app


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """URL, and the keys of a user and of an admin."""
    url = f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'fuzz.db'}"
    access = AccessSettings(mode="keys", database=url, secret="fuzz")  # type: ignore[arg-type]
    gateway = Gateway(
        NullEnginePort(context=256, reply_tokens=5),
        Settings(access=access, timeouts={"database": 60}, log={"requests": False}),
    )  # type: ignore[arg-type]
    keys = {name: gateway.keys.create(name, admin=name == "admin")[1] for name in ("user", "admin")}
    with serving(gateway.app, beside=gateway) as port:
        yield f"http://127.0.0.1:{port}", keys


engine_schema = schemathesis.openapi.from_dict(described().openapi())


class _Database:
    """What the usage app's document needs: nothing is asked of it."""


own_schema = schemathesis.openapi.from_dict(
    document("0", GENERATING, ANSWERING, build_own_usage(_Database()).openapi(), keys_required=True)  # type: ignore[arg-type]
)


class _Gateway:
    """What the admin app's document needs: nothing is asked of it."""

    keys = None


admin_schema = schemathesis.openapi.from_dict(build_admin(_Gateway()).openapi())  # type: ignore[arg-type]


def is_answered(case: Any, running: tuple[str, dict[str, str]], user: str) -> None:
    url, keys = running
    reply = case.call(base_url=url, headers={"Authorization": f"Bearer {keys[user]}"})
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]


@engine_schema.parametrize()
@quick
def test_the_engines_routes(case: Any, running: tuple[str, dict[str, str]]) -> None:
    is_answered(case, running, "user")


@own_schema.parametrize()
@quick
def test_the_routes_as_we_describe_them(case: Any, running: tuple[str, dict[str, str]]) -> None:
    is_answered(case, running, "user")


@admin_schema.parametrize()
@quick
def test_the_admin_routes(case: Any, running: tuple[str, dict[str, str]]) -> None:
    is_answered(case, running, "admin")
