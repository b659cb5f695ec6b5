"""`/`: one static file, which may load nothing and talk to nobody but this server."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.types import Receive, Scope, Send

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


class StatusPage:
    """Answers GET and HEAD with the page. An ASGI app.

    What may run is named by hash in the Content-Security-Policy, so that a text of a model or a user's name that got
    into the page as markup would do nothing. The page itself holds no data: it asks for it with the key it is given;
    the header `x-synthia-keys` tells it whether one is needed.
    """

    def __init__(self, keys_required: bool) -> None:
        text = files(__package__).joinpath("index.html").read_text(encoding="utf-8")
        self.body = text.encode()
        self.etag = f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'.encode()
        self._headers = [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-security-policy", content_security_policy(text).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
            (b"x-synthia-keys", b"required" if keys_required else b"none"),
            (b"cache-control", b"no-cache"),
            (b"etag", self.etag),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = any(name == b"if-none-match" and self.etag in value for name, value in scope["headers"])
        headers = list(self._headers)
        if not known:
            headers.append((b"content-length", str(len(self.body)).encode()))
        await send({"type": "http.response.start", "status": 304 if known else 200, "headers": headers})
        body = b"" if known or scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body})


def content_security_policy(html: str) -> str:
    """Nothing but the styles and scripts that are in the page, requests to its own server, and its icon."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
