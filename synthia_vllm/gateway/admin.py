"""`/admin/*`: what the `keys` and `usage` commands do, over HTTP, and the live view. Access lets admin keys in only."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from synthia_vllm.errors import NotFound, SetupError, UpstreamLost
from synthia_vllm.gateway.accounts import MAX_LIMIT, USER_NAME, Priority, UserLimits
from synthia_vllm.gateway.json_app import MOMENT, answer, json_app, moment
from synthia_vllm.gateway.store.inputs import MAX_GRACE_S, end_time, model_name, unix_time, user_name
from synthia_vllm.gateway.store.keys import UnknownKey, UnknownUser
from synthia_vllm.gateway.store.usage import usage

if TYPE_CHECKING:
    from synthia_vllm.gateway.app import Gateway

# The types are JSON's own: true is true and "5" is no number.
_STRICT = ConfigDict(extra="forbid", strict=True)
_NAME = f"^{USER_NAME}$"
_Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
_Model = Annotated[str, AfterValidator(model_name)]


class UserChange(BaseModel):
    """What to set of a user; what is left out stays as it is, null takes it away again."""

    model_config = _STRICT

    weight: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    priority: Priority | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    concurrent_requests: _Limit | None = None
    tokens_per_month: _Limit | None = None
    models: Annotated[list[_Model], Field(min_length=1)] | None = None

    def of_the_user(self) -> dict[str, Any]:
        """In the store's words."""
        names = UserChange.model_fields.keys() & self.model_fields_set
        return {
            "weight": self.weight,
            "priority": self.priority,
            "limits": UserLimits.of(self),
            "models": self.models,
            "unset": {name for name in names if getattr(self, name) is None},
        }


class NewKey(UserChange):
    """A key to make, and what to set of its user."""

    user: Annotated[str, Field(pattern=_NAME), AfterValidator(user_name)]
    admin: bool = False
    expires: Annotated[str | None, Field(**MOMENT)] = None


class Rotation(BaseModel):
    model_config = _STRICT

    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S, description="how long the old key still opens")] = 0.0


def build_admin(gateway: "Gateway") -> FastAPI:
    """The app behind `/admin/`. Database work runs in FastAPI's threads, off the event loop."""
    app = json_app("synthia-vllm admin", openapi_url="/admin/openapi.json")
    store = gateway.keys

    @app.get("/admin/state")
    async def state() -> dict[str, Any]:
        return await gateway.state()

    @app.get("/admin/live")
    async def live() -> dict[str, Any]:
        await gateway.exporter.refresh()
        return gateway.exporter.live()

    @app.get("/admin/keys")
    def list_keys() -> list[Any]:
        return store.list_keys()

    async def served() -> Sequence[str]:
        """The models that there are; none where nobody can tell."""
        try:
            return await gateway.apis.models()
        except UpstreamLost:
            return ()

    @app.post("/admin/keys", status_code=201)
    def create_key(new: NewKey, names: Annotated[Sequence[str], Depends(served)]) -> dict[str, str]:
        key_id, key = store.create(
            new.user,
            admin=new.admin,
            expires=moment("expires", new.expires, end_time),
            **new.of_the_user(),
        )
        return {"id": key_id, "key": key, **_warning(new.models or (), names)}

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

    @app.patch("/admin/users/{user}")
    def change_user(user: str, change: UserChange) -> dict[str, Any]:
        return store.change(user, **change.of_the_user())

    @app.get("/admin/usage")
    def show_usage(
        by: Literal["user", "day", "model"] = "user",
        user: Annotated[str | None, Query(pattern=_NAME)] = None,
        since: Annotated[str | None, Query(**MOMENT)] = None,
        until: Annotated[str | None, Query(**MOMENT)] = None,
    ) -> list[Any]:
        start, end = moment("since", since, unix_time), moment("until", until, unix_time)
        rows = usage(store.engine, user=user, since=start, until=end, by=by)
        return [asdict(row) for row in rows]

    @app.exception_handler(UnknownKey)
    @app.exception_handler(UnknownUser)
    async def unknown(request: Request, error: SetupError) -> JSONResponse:
        return answer(NotFound(request.scope["path"]))

    return app


def _warning(wanted: Sequence[str], served: Sequence[str]) -> dict[str, str]:
    """What to tell of models that a key is for and nobody serves: no error, as they may come later."""
    missing = [name for name in wanted if name not in served]
    if not missing or not served:
        return {}
    return {"warning": f"not served now: {', '.join(missing)}; the models are {', '.join(served)}"}
