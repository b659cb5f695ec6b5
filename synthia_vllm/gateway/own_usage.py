"""`/v1/usage`: what the user of a key has used, and the receipts of a request. Everyone sees his own."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request
from sqlalchemy import Engine

from synthia_vllm.errors import NotFound
from synthia_vllm.gateway.json_app import MOMENT, json_app, moment
from synthia_vllm.gateway.store.inputs import unix_time
from synthia_vllm.gateway.store.usage import receipts, usage

PATH = "/v1/usage"
USER = "synthia.user"  # key of the scope: whose usage is asked for


def is_usage(route: str) -> bool:
    return route == PATH or route.startswith(f"{PATH}/")


def build_own_usage(engine: Engine) -> FastAPI:
    """The app behind `/v1/usage`; the scope's USER says who asks. The database is asked in FastAPI's threads."""
    app = json_app("synthia-vllm usage")

    @app.get(PATH)
    def show(
        request: Request,
        by: Literal["day", "model"] = "day",
        since: Annotated[str | None, Query(**MOMENT)] = None,
        until: Annotated[str | None, Query(**MOMENT)] = None,
    ) -> dict[str, Any]:
        user = request.scope[USER]
        start, end = moment("since", since, unix_time), moment("until", until, unix_time)
        rows = usage(engine, user=user, since=start, until=end, by=by)
        return {"object": "list", "user": user, "by": by, "data": [asdict(row) for row in rows]}

    @app.get(f"{PATH}/{{request_id}}")
    def show_receipts(request: Request, request_id: Annotated[str, Path(max_length=160)]) -> dict[str, Any]:
        found = receipts(engine, request.scope[USER], request_id)
        if not found:
            raise NotFound(request.scope["path"])
        return {"object": "list", "request_id": request_id, "data": [asdict(one) for one in found]}

    return app
