"""`/admin/*`: what the `keys` and `usage` commands do, over HTTP, and the live view. Access lets admin keys in only."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from synthia_vllm.api.errors import openai_form
from synthia_vllm.errors import NotFound, RequestError
from synthia_vllm.gateway.accounts import MAX_LIMIT, USER_NAME, Priority, UserLimits
from synthia_vllm.gateway.store.keys import UnknownKey
from synthia_vllm.gateway.store.usage import usage

if TYPE_CHECKING:
    from synthia_vllm.gateway.app import Gateway

_Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
_NAME = Field(pattern=f"^{USER_NAME}$")


class NewKey(BaseModel):
    """A key to make, and what to set of its user; what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    user: Annotated[str, _NAME]
    admin: bool = False
    expires: datetime | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    priority: Priority | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    concurrent_requests: _Limit | None = None
    tokens_per_month: _Limit | None = None
    models: list[str] | None = None


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    grace_s: Annotated[float, Field(ge=0, le=30 * 86400, description="how long the old key still opens")] = 0.0


def build_admin(gateway: "Gateway") -> FastAPI:
    """The app behind `/admin/`. Database work runs in FastAPI's threads, off the event loop."""
    app = FastAPI(title="synthia-vllm admin", openapi_url="/admin/openapi.json", docs_url=None, redoc_url=None)
    store = gateway.keys

    @app.get("/admin/state")
    async def state() -> dict[str, Any]:
        return await gateway.state()

    @app.get("/admin/live")
    async def live() -> dict[str, Any]:
        return gateway.exporter.live()

    @app.get("/admin/keys")
    def list_keys() -> list[Any]:
        return store.list_keys()

    @app.post("/admin/keys", status_code=201)
    def create_key(new: NewKey) -> dict[str, str]:
        limits = UserLimits(
            new.requests_per_minute, new.tokens_per_minute, new.concurrent_requests, new.tokens_per_month
        )
        expires = new.expires.timestamp() if new.expires else None
        key_id, key = store.create(
            new.user,
            admin=new.admin,
            expires=expires,
            weight=new.weight,
            priority=new.priority,
            limits=limits,
            models=new.models,
        )
        return {"id": key_id, "key": key}

    @app.post("/admin/keys/{key_id}/rotate", status_code=201)
    def rotate_key(key_id: str, rotation: Annotated[Rotation, Body(default_factory=Rotation)]) -> dict[str, str]:
        new_id, key = store.rotate(key_id, rotation.grace_s)
        return {"id": new_id, "key": key}

    @app.delete("/admin/keys/{key_id}", status_code=204)
    def revoke_key(key_id: str) -> None:
        store.revoke(key_id)

    @app.get("/admin/users")
    def list_users() -> list[Any]:
        return store.list_users()

    @app.get("/admin/usage")
    def show_usage(
        by: Literal["user", "day", "model"] = "user",
        user: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[Any]:
        rows = usage(store.engine, user=user, since=_unix(since), until=_unix(until), by=by)
        return [row.as_dict() for row in rows]

    @app.exception_handler(UnknownKey)
    async def unknown_key(request: Request, error: UnknownKey) -> JSONResponse:
        return _answer(NotFound(request.url.path))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return _answer(RequestError(f"{field}: {first['msg']}", param=field))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        wrong = RequestError(str(error.detail))
        wrong.status = error.status_code
        return _answer(wrong)

    return app


def _answer(error: RequestError) -> JSONResponse:
    return JSONResponse(openai_form(error), error.status)


def _unix(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
