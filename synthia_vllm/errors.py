"""Every error that a user can meet, each with its HTTP status and its cure in the text.

SynthiaError
├── RequestError (400)          what a client sent can't be served
│   ├── MalformedBody (400)     not JSON, not UTF-8, not an object
│   ├── NotFound (404)          no such route
│   ├── MethodNotAllowed (405)
│   └── BodyTooLarge (413)
└── SetupError                  the machine or the options can't serve; shown by the command, exit code 2
"""

from typing import Any


class SynthiaError(Exception):
    """Base of all errors raised by this package on purpose."""


class RequestError(SynthiaError):
    """A request that can't be served. `param` names the field at fault, as in OpenAI's error object."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}


class MalformedBody(RequestError):
    """The body is not a JSON object in UTF-8."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request body is not valid JSON: {reason}", param="body")


class NotFound(RequestError):
    """The route is not on the allow-list."""

    status = 404

    def __init__(self, path: str) -> None:
        super().__init__(f"there is nothing at {path}; the routes are listed in the README")


class MethodNotAllowed(RequestError):
    """The route is there, for another method."""

    status = 405

    def __init__(self, path: str, method: str) -> None:
        super().__init__(f"{path} is asked with {method}")


class BodyTooLarge(RequestError):
    """The body is over the limit."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is over {limit} bytes; raise --max-body-bytes or send less", param="body")


class SetupError(SynthiaError):
    """The options or the machine can't serve. The text says what to change."""
