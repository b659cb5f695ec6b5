"""URLs that may hold a password: read strictly, and never repeated, since a malformed one shows it in any part.

All checks raise ValueError that says what would be right.
"""

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from pydantic import SecretStr

_ENCODE = "what is special in its password is written as %40 for @, %2F for /, %3A for :, %23 for #"
REDIS_FORM = f"a URL like redis://:PASSWORD@HOST:6379/0; {_ENCODE}"
DATABASE_FORM = f"an SQLAlchemy URL like postgresql+psycopg://USER:PASSWORD@HOST:5432/NAME or sqlite:///FILE; {_ENCODE}"
# Of an address: a name, an IPv4 or IPv6 one.
_HOST = re.compile(r"[\w.-]*|[0-9A-Fa-f:.]+(%\w+)?")


def reveal(secret: SecretStr | None) -> str | None:
    """What a setting hides, for whoever connects."""
    return None if secret is None else secret.get_secret_value()


def redis_url(secret: SecretStr) -> SecretStr:
    """Checks a URL of Redis."""
    try:
        found = urlsplit(secret.get_secret_value())
        _ = found.port  # raises where it is none
    except ValueError:
        found = urlsplit("")
    of_file = found.scheme == "unix"
    path = re.fullmatch(r"/[^:]+" if of_file else r"/?\d*", found.path)
    place = of_file or (found.scheme in ("redis", "rediss") and found.netloc)
    if not path or not place or found.fragment or not _tame(found.hostname, found.path, found.query):
        raise ValueError(REDIS_FORM)
    return secret


def database_url(host: str | None, *rest: str | None) -> None:
    """Checks the parts of a database's URL, as SQLAlchemy reads it, that may be shown."""
    if not _tame(host, *rest):
        raise ValueError(DATABASE_FORM)


def open_url(url: str) -> str:
    """Checks a URL that is shown and written down as it is: it has no room for a password."""
    try:
        found = urlsplit(url)
        _ = found.port
    except ValueError:
        found = urlsplit("")
    if found.scheme not in ("http", "https") or not found.hostname or not _tame(found.hostname, found.path, url):
        raise ValueError("a URL like http://127.0.0.1:8001, without a user or a password")
    return url


def without(text: str, words: Iterable[str]) -> str:
    """A text about what somebody typed, less the words of it that may be URLs with a password."""
    for word in sorted(words, key=len, reverse=True):
        for part in {word, word.partition("=")[2], repr(word)[1:-1]}:
            if "@" in part or "://" in part:
                text = text.replace(part, "…")
    return text


def _tame(host: str | None, *rest: str | None) -> bool:
    """Whether the parts are those of a URL whose password ended where its writer thinks."""
    return _HOST.fullmatch(host or "") is not None and not any("@" in part for part in rest if part)
