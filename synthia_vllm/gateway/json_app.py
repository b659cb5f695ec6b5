"""FastAPI for what is not on the way of tokens: its errors in the form that all our routes have."""

from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from synthia_vllm.api.errors import openai_form
from synthia_vllm.errors import MethodNotAllowed, NotFound, Overloaded, RequestError, SynthiaError

# Of a moment's field in the document.
MOMENT: Any = {"description": "ISO 8601; without an offset it is UTC", "json_schema_extra": {"format": "date-time"}}
_RETRY_S = 5.0  # after which a database that was lost may be asked again
_log = structlog.get_logger(__name__)


def json_app(title: str, *, openapi_url: str | None = None) -> FastAPI:
    """An app without routes. What is raised in a route, or is wrong in a request, is answered in OpenAI's form."""
    app = FastAPI(title=title, openapi_url=openapi_url, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # a redirect would lead to whatever host the client named

    @app.exception_handler(SQLAlchemyError)
    async def lost(request: Request, error: SQLAlchemyError) -> JSONResponse:
        _log.error("database_lost", route=request.scope["path"], error=str(error).partition("\n")[0])
        return answer(Overloaded("the database can't be asked now", _RETRY_S))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return answer(RequestError(f"{field}: {first['msg'].removeprefix('Value error, ')}", param=field))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return answer(NotFound(request.scope["path"]))
        if error.status_code == 405:
            return answer(MethodNotAllowed(request.scope["path"], (error.headers or {}).get("Allow", "").split(", ")))
        wrong = RequestError(str(error.detail))
        wrong.status = error.status_code
        return answer(wrong)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return answer(SynthiaError())  # and it is raised on: Access logs it

    return app


def answer(error: SynthiaError) -> JSONResponse:
    if not isinstance(error, RequestError):
        return JSONResponse(openai_form(error), 500)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return JSONResponse(openai_form(error), error.status, headers)


def moment(name: str, text: str | None, rule: Callable[[str], float]) -> float | None:
    """What a text means by a rule. Raises RequestError that names the field."""
    try:
        return None if text is None else rule(text)
    except ValueError as error:
        raise RequestError(f"{name}: {error}", param=name) from None
