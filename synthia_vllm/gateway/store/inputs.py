"""What operators give, checked by one rule for the commands and for `/admin`. All raise ValueError that says why."""

import re
import time
import unicodedata
from datetime import UTC, datetime

from synthia_vllm.gateway.accounts import ANONYMOUS, USER_NAME
from synthia_vllm.metrics.series import OTHER

MAX_GRACE_S = 30 * 86_400.0
# Whose requests have no key, and the users of whom there are no series of their own: not to be billed to somebody.
_RESERVED = (ANONYMOUS.user, OTHER)
_MOST_OF_A_NAME = 255


def user_name(text: str) -> str:
    """A name for a user, which is also a label and a column."""
    if not re.fullmatch(USER_NAME, text):
        raise ValueError("1 to 64 letters, digits or any of . _ @ : + -")
    if (usual := unicodedata.normalize("NFKC", text)) != text:
        raise ValueError(f"letters in an unusual form, which look like {usual!r}; use that")
    if text in _RESERVED:
        raise ValueError(f"{text!r} is what requests of nobody in particular are counted under; take another name")
    return text


def model_name(text: str) -> str:
    """The name of a model that a key opens, which may be served later."""
    if not text.strip() or len(text) > _MOST_OF_A_NAME or not text.isprintable():
        raise ValueError(f"a model's name, of at most {_MOST_OF_A_NAME} characters")
    return text


def unix_time(text: str) -> float:
    """The Unix time of a date, or date and time, in ISO 8601; what has no offset is UTC."""
    try:
        found = datetime.fromisoformat(text)
        seconds = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)  # an offset may lead out of the years that can be told
    except (ValueError, OverflowError):
        raise ValueError("a date like 2027-01-31, or 2027-01-31T12:00:00+01:00 (without an offset: UTC)") from None
    return seconds


def end_time(text: str) -> float:
    """The Unix time of a moment that is still to come."""
    seconds = unix_time(text)
    if seconds <= time.time():
        raise ValueError("that is past (a time without an offset is UTC)")
    return seconds


def iso_time(seconds: float | None) -> str | None:
    """A Unix time for people, whatever is stored."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return f"Unix time {seconds:g}"
