"""Under which names a server answers, and to which websites' pages.

A page of any website can have its visitor's browser ask a server on the visitor's machine. It may give its own name
that machine's address (DNS rebinding): then the browser takes the server for the website, and lets the page read
replies. Or it posts without reading. Where keys are needed the page has none; else the Host and the Origin tell.
"""

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.errors import ForeignOrigin, Misdirected, RequestError
from synthia_vllm.gateway.edge.replies import header, refuse

PROBED = ("/health", "/ready")  # by whatever address a machine has; they tell nothing that is worth a name
_SAFE = ("GET", "HEAD", "OPTIONS")


class Hosts:
    """Refuses requests for names that are not ours (421), and those of other websites' pages that do more than read
    (403). A pure ASGI layer.

    Ours are `names`, localhost and loopback addresses. `origins` are websites whose pages may ask as well; None: pages
    of all may, for they need a key.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], *, origins: Iterable[str] | None) -> None:
        self.app = app
        self._names = frozenset(name.lower().rstrip(".") for name in names)
        self._origins = None if origins is None else frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in PROBED else None
        if error is None:
            return await self.app(scope, receive, send)
        return await refuse(error, scope, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        host = header(scope, b"host").decode("latin-1")
        if host and not self._is_ours(f"//{host}"):  # without one, as in HTTP/1.0, it is no browser's
            return Misdirected(host)
        origin = header(scope, b"origin").decode("latin-1")
        if not origin or self._origins is None or scope["method"] in _SAFE or self._is_ours(origin):
            return None
        return ForeignOrigin(origin) if self._origins.isdisjoint((origin, "*")) else None

    def _is_ours(self, url: str) -> bool:
        try:
            name = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self._names or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
