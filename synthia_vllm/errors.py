"""Every error that a user can meet, each with its HTTP status and its cure in the text.

SynthiaError
├── RequestError (400)          what a client sent can't be served
│   ├── MalformedBody (400)     not JSON, not UTF-8, not an object
│   ├── Unauthorized (401)      no key, or one that is not known, revoked or expired
│   ├── Forbidden (403)         a key that does not open this
│   ├── ForeignOrigin (403)     a page of another website asks
│   ├── NotFound (404)          no such route
│   ├── MethodNotAllowed (405)
│   ├── BodyTimeout (408)       the body did not arrive in time
│   ├── RequestAborted (409)    its own user has ended it
│   ├── ReplyNotKept (410)      the rest of a reply that is not in the journal
│   ├── BodyTooLarge (413)
│   ├── UnsupportedMedia (415)  a body in a form that is not read here
│   ├── Misdirected (421)       a request for another server's name
│   ├── RequestNotFound (404)   no request of this name is under way
│   ├── ModelNotFound (404)     no model of that name is served
│   ├── ContextTooLong (400)    prompt and reply don't fit the model's context
│   ├── LimitExceeded (429)     this user's limit; tells when to come back
│   ├── UpstreamLost (502)      the engine can't be reached, or broke off
│   ├── Overloaded (503)        our overload: the queue is full or too slow; tells when to come back
│   ├── QueueTimeout (503)      waited as long as was allowed
│   └── UpstreamTimeout (504)
└── SetupError                  the machine or the options can't serve; shown by the command, exit code 2
"""

import math
from collections.abc import Iterable, Sequence


class SynthiaError(Exception):
    """Base of all errors raised by this package on purpose."""


class RequestError(SynthiaError):
    """A request that can't be served. `param` names the field at fault, as in OpenAI's error object."""

    status = 400
    type = "invalid_request_error"  # as OpenAI names it; `api.errors` knows the others' names
    code: str | None = None  # as OpenAI names it
    reason = "bad_request"  # one word, for metrics and logs

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: list[tuple[bytes, bytes]] = []


class MalformedBody(RequestError):
    """The body is not a JSON object in UTF-8."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request body is not valid JSON: {reason}", param="body")


class Unauthorized(RequestError):
    """No key, or none that opens anything. One text for all cases: it tells a guesser nothing."""

    status = 401
    code = "invalid_api_key"
    reason = "unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "a valid API key is needed: send `Authorization: Bearer sk-synthia-…` or `x-api-key`; "
            "an operator makes one with `synthia-vllm keys create`"
        )
        self.headers = [(b"www-authenticate", b"Bearer")]


class Forbidden(RequestError):
    """A valid key that does not open this."""

    status = 403
    code = "permission_denied"
    reason = "forbidden"


class ForeignOrigin(RequestError):
    """A page of another website asks a server that needs no key."""

    status = 403
    code = "foreign_origin"
    reason = "foreign_origin"

    def __init__(self, origin: str) -> None:
        super().__init__(
            f"pages of {origin[:100]!r} may not ask this server, which needs no key; add --cors-origins {origin[:100]} "
            "if they may",
            param="Origin",
        )


class Misdirected(RequestError):
    """The request is for a name that is not this server's."""

    status = 421
    code = "misdirected_request"
    reason = "misdirected"

    def __init__(self, host: str) -> None:
        name = host[:100].rpartition(":")[0] or host[:100]
        super().__init__(f"this server does not answer as {host[:100]!r}; add --access.hosts {name}", param="Host")


class NotFound(RequestError):
    """The route is not on the allow-list."""

    status = 404
    reason = "not_found"

    code: str | None = "not_found"

    def __init__(self, path: str) -> None:
        super().__init__(f"there is nothing at {path}; the routes are listed in docs/usage.md")


class RequestNotFound(RequestError):
    """No request of this user has this name and is under way."""

    status = 404
    code = "request_not_found"
    reason = "not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"no request of yours with X-Request-Id {name!r} is under way", param="request_id")


class RequestAborted(RequestError):
    """The request's own user has ended it."""

    status = 409
    code = "request_aborted"
    reason = "aborted"

    def __init__(self) -> None:
        super().__init__("this request was aborted by its user")


class ReplyNotKept(RequestError):
    """A client comes back for the rest of a reply of which nothing is kept."""

    status = 410
    code = "reply_not_kept"
    reason = "not_kept"

    def __init__(self, why: str) -> None:
        super().__init__(f"this reply can't go on: {why}; ask anew, without Last-Event-ID", param="Last-Event-ID")


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    status = 404
    code = "model_not_found"
    reason = "model_not_found"

    def __init__(self, name: str, names: Iterable[str]) -> None:
        super().__init__(f"there is no model {name[:100]!r} here; it serves {', '.join(names)}", param="model")


class ContextTooLong(RequestError):
    """The prompt and the wanted reply don't fit the model's context. Counts are tokens."""

    code = "context_length_exceeded"
    reason = "context_too_long"

    def __init__(
        self, prompt: int, wanted: int, limit: int, *, param: str, prompt_param: str, at_least: bool = False
    ) -> None:
        if prompt >= limit:
            has = "at least " if at_least else ""
            super().__init__(
                f"the prompt has {has}{prompt} tokens, and the model's context {limit} for prompt and reply; "
                "shorten the prompt",
                param=prompt_param,
            )
        else:
            super().__init__(
                f"a prompt of {prompt} tokens and {param} {wanted} exceed the model's context of {limit} tokens; "
                f"shorten the prompt or ask for at most {limit - prompt}",
                param=param,
            )


class MethodNotAllowed(RequestError):
    """The route is there, for another method."""

    status = 405
    code = "method_not_allowed"
    reason = "not_found"

    def __init__(self, path: str, allowed: Sequence[str]) -> None:
        super().__init__(f"{path} is asked with {' or '.join(allowed)}")
        self.headers = [(b"allow", ", ".join(allowed).encode())]


class BodyTimeout(RequestError):
    """The client stopped sending its body."""

    status = 408
    reason = "body_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no more of the body came for {seconds:g} s", param="body")
        self.headers = [(b"connection", b"close")]


class BodyTooLarge(RequestError):
    """The body is over the limit."""

    status = 413
    code = "request_too_large"
    reason = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is over {limit} bytes; raise --max-body-bytes or send less", param="body")


class UnsupportedMedia(RequestError):
    """A body whose form is not read here."""

    status = 415
    code = "unsupported_media_type"
    reason = "unsupported_media"


class RetryLater(RequestError):
    """Something that waiting cures; `retry_after` is in seconds and goes out rounded up, at least 1."""

    def __init__(self, message: str, retry_after: float) -> None:
        seconds = max(1, math.ceil(retry_after))
        super().__init__(f"{message}; try again in {seconds} s")
        self.retry_after = retry_after
        self.headers = [(b"retry-after", str(seconds).encode())]


class LimitExceeded(RetryLater):
    """A limit of this user."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, name: str, limit: int, retry_after: float) -> None:
        super().__init__(f"your limit of {limit} {name.replace('_', ' ')} is reached", retry_after)
        self.reason = name


class Overloaded(RetryLater):
    """More is asked of us than we can answer in time."""

    status = 503
    type = "server_error"
    code = "overloaded"
    reason = "overloaded"


class QueueTimeout(Overloaded):
    """Waited as long as the client or the operator allows."""

    reason = "queue_timeout"


class UpstreamLost(RequestError):
    """The engine can't be reached, or broke off before its first byte."""

    status = 502
    type = "server_error"
    code = "upstream_lost"
    reason = "upstream_lost"


class UpstreamTimeout(UpstreamLost):
    """The engine sent nothing for too long."""

    status = 504
    code = "upstream_timeout"
    reason = "upstream_timeout"


class SetupError(SynthiaError):
    """The options or the machine can't serve. The text says what to change."""
