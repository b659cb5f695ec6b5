"""Which routes there are, and with which methods; CORS. Engines have many more, some of which change the server."""

from collections.abc import Awaitable, Iterable, Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.api.errors import form_of
from synthia_vllm.errors import MethodNotAllowed, NotFound, SynthiaError
from synthia_vllm.gateway.edge.replies import header, refuse, send_error

ADMIN_PREFIX = "/admin/"  # has its own routes, behind a key of its own

METRICS = ("/metrics", "/sd")

Headers = list[tuple[bytes, bytes]]

# `*` stands for the rest, such as those that a client's library adds, but never for Authorization (Fetch, 3.3.3).
_REQUEST_HEADERS = (
    b"authorization, content-type, x-api-key, x-request-id, x-session-id, x-queue-timeout-s, last-event-id, "
    b"anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access, *"
)
_REPLY_HEADERS = b"x-request-id, retry-after, " + b", ".join(
    b"x-ratelimit-%s-%s" % (what, of) for of in (b"requests", b"tokens") for what in (b"limit", b"remaining", b"reset")
)
_PREFLIGHT_AGE_S = b"7200"  # what browsers keep at most


def for_operators(path: str) -> bool:
    """Whether a route is about keys, users or metrics, and asks for an admin's key."""
    return path in METRICS or path.startswith(ADMIN_PREFIX)


class Routes:
    """Passes what is on the allow-list, answers 404 and 405 for all else. A pure ASGI layer.

    `methods` names those of each path; a path that ends in `/` stands for all that is below it. HEAD comes with GET,
    and is passed on as GET: its reply goes out without the body. OPTIONS is answered here, without a key. `pages` are
    what answers at some paths without one.

    `cors_origins` are the origins, or `*`, whose pages may read replies in a browser (Fetch, 3.3). It is no access
    control: keys do not travel as cookies, so nobody's browser has one to lend.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        methods: Mapping[str, tuple[str, ...]],
        pages: Mapping[str, ASGIApp] | None = None,
        cors_origins: Sequence[str] = (),
    ) -> None:
        self.app = app
        self.pages = dict(pages or {})
        self.cors_origins = frozenset(origin.encode() for origin in cors_origins)
        self.methods = {path: _with_implied(given) for path, given in methods.items()}
        self.methods |= dict.fromkeys(self.pages, _with_implied(("GET",)))
        self._prefixes = [path for path in self.methods if path.endswith("/") and path != "/"]
        self._all = _with_implied(dict.fromkeys(method for given in methods.values() for method in given))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": "no such route"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] != "HEAD" and not self.cors_origins:
            return await self._answer(scope, receive, send)
        reply = _Reply(send, self._cors(scope), without_body=scope["method"] == "HEAD")
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            await self._answer(scope, receive, reply)
        except Exception:
            if not reply.started:  # the protocol would answer as well, but without CORS
                await send_error(SynthiaError(), reply, form=form_of(scope["path"], dict(scope["headers"])))
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        allowed = self._allowed(path)
        if method == "OPTIONS" and (allowed or path == "*"):
            return await self._options(scope, allowed or self._all, send)
        if allowed is None or method not in allowed:
            error = NotFound(path) if allowed is None else MethodNotAllowed(path, allowed)
            return await refuse(error, scope, send)
        return await self.pages.get(path, self.app)(scope, receive, send)

    def _allowed(self, path: str) -> tuple[str, ...] | None:
        found = self.methods.get(path)
        if found is not None and path not in self._prefixes:
            return found
        return next((self.methods[it] for it in self._prefixes if path.startswith(it) and path != it), None)

    async def _options(self, scope: Scope, allowed: tuple[str, ...], send: Send) -> None:
        methods = ", ".join(allowed).encode()
        headers = [(b"allow", methods)]
        if self._granted(scope) and header(scope, b"access-control-request-method"):
            headers += [
                (b"access-control-allow-methods", methods),
                (b"access-control-allow-headers", _REQUEST_HEADERS),
                (b"access-control-max-age", _PREFLIGHT_AGE_S),
            ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _granted(self, scope: Scope) -> bytes:
        """The origin that may read the reply, empty for none."""
        origin = header(scope, b"origin")
        if origin and b"*" in self.cors_origins:
            return b"*"
        return origin if origin in self.cors_origins else b""

    def _cors(self, scope: Scope) -> Headers:
        headers: Headers = []
        if self.cors_origins and b"*" not in self.cors_origins:
            headers.append((b"vary", b"Origin"))  # also where there is none: a cache keeps that reply too
        if granted := self._granted(scope):
            headers += [(b"access-control-allow-origin", granted), (b"access-control-expose-headers", _REPLY_HEADERS)]
        return headers


class _Reply:
    """A reply on its way out: with more headers, and for HEAD without its body."""

    def __init__(self, send: Send, headers: Headers, *, without_body: bool) -> None:
        self.started = False
        self._send = send
        self._headers = headers
        self._without_body = without_body

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        elif self._without_body:
            message = {**message, "body": b""}
        return self._send(message)


def _with_implied(methods: Iterable[str]) -> tuple[str, ...]:
    """The methods of a route and those that come with them."""
    found = dict.fromkeys(methods)
    if "GET" in found:
        found["HEAD"] = None
    found["OPTIONS"] = None
    return tuple(found)
