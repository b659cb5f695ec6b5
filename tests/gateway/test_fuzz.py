"""Requests made up from OpenAPI documents, at the whole gateway behind a real uvicorn: no 5xx may be ours.

The upstream validates with vLLM's own request classes and generates nothing.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from synthia_vllm.gateway.admin import build_admin
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.settings import AccessSettings, Settings
from tests.gateway.live import serving

EXAMPLES = int(os.environ.get("SYNTHIA_FUZZ_EXAMPLES", "60"))
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


async def refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error) or "refused"}}, 400)


def validating_engine() -> FastAPI:
    app = FastAPI()
    for kind in (VLLMValidationError, ValueError, TypeError, KeyError, AttributeError):  # vLLM's app has handlers
        app.add_exception_handler(kind, refused)
    reply = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest) -> dict[str, Any]:
        return reply

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> dict[str, Any]:
        return reply

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "synthia"}]}

    return app


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """URL, and the keys of a user and of an admin."""
    url = f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'fuzz.db'}"
    access = AccessSettings(mode="keys", database=url, secret="fuzz")  # type: ignore[arg-type]
    gateway = Gateway(validating_engine(), Settings(access=access))
    keys = {name: gateway.keys.create(name, admin=name == "admin")[1] for name in ("user", "admin")}
    with serving(gateway.app) as port:
        yield f"http://127.0.0.1:{port}", keys


engine_schema = schemathesis.openapi.from_dict(validating_engine().openapi())


class _Gateway:
    """What the admin app's document needs: nothing is asked of it."""

    keys = None


admin_schema = schemathesis.openapi.from_dict(build_admin(_Gateway()).openapi())  # type: ignore[arg-type]


@engine_schema.parametrize()
@quick
def test_the_engines_routes(case: Any, running: tuple[str, dict[str, str]]) -> None:
    url, keys = running
    reply = case.call(base_url=url, headers={"Authorization": f"Bearer {keys['user']}"})
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400 and reply.status_code != 422:  # 422 is the stand-in's own
        assert reply.json()["error"]["message"]


@admin_schema.parametrize()
@quick
def test_the_admin_routes(case: Any, running: tuple[str, dict[str, str]]) -> None:
    url, keys = running
    reply = case.call(base_url=url, headers={"Authorization": f"Bearer {keys['admin']}"})
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]
