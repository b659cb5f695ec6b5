"""Errors in the forms, and with the names, of the APIs.

OpenAI's: *Error codes* of its API reference, and `openai.types.shared.ErrorObject`. Anthropic's: *Errors* of its API
reference, and `anthropic.types.shared`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from synthia_vllm.errors import RequestError, SynthiaError

ErrorForm = Callable[[SynthiaError, str], dict[str, Any]]

NO_HEADERS: Mapping[bytes, bytes] = {}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def openai_form(error: SynthiaError, request_id: str = "") -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, code a name or null."""
    if not isinstance(error, RequestError):
        return {"error": {"message": _OURS, "type": "server_error", "param": None, "code": "internal_error"}}
    found = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": found}


def anthropic_form(error: SynthiaError, request_id: str = "") -> dict[str, Any]:
    """`{"type": "error", "error": {type, message}, "request_id": …}`."""
    status, message = (error.status, error.message) if isinstance(error, RequestError) else (500, _OURS)
    kind = _ANTHROPIC_TYPES.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id or None}


def form_of(path: str, headers: Mapping[bytes, bytes] = NO_HEADERS) -> ErrorForm:
    """By the route that was asked, so that errors before any API has seen the request have its form too.

    The models are asked for by both APIs' clients: there a header tells whose it is, that Anthropic's always send.
    """
    theirs = path == "/v1/messages" or path.startswith("/v1/messages/")
    shared = path == "/v1/models" or path.startswith("/v1/models/")
    return anthropic_form if theirs or (shared and b"anthropic-version" in headers) else openai_form


_OURS = "the server failed on this request; the operator's log tells more under its request id"
