"""Who shares the engine's prefix cache with whom."""

import hashlib
import hmac
from typing import Literal

from synthia_vllm.gateway.accounts import Account

_PURPOSE = b"synthia-vllm: prefix cache"


class CacheSharing:
    """Salts the engine's prefix cache, so that how soon a reply begins tells nothing of what others asked.

    A salt is an HMAC under a key derived from the secret that gateways share: every gateway makes the same, and nobody
    else can. The client's own salt goes into it and no further: it divides what a client shares with himself, as a
    gateway's does that asks another one for its users, and never leads to what is others'.
    """

    def __init__(self, mode: Literal["all", "group", "user"], secret: bytes) -> None:
        self.mode = mode
        self._key = hmac.digest(secret, _PURPOSE, hashlib.sha256)

    def salt(self, account: Account, given: str | None = None) -> str | None:
        """Equal for those who share; `given` is the client's own. None: vLLM's unsalted cache, for all."""
        if self.mode == "all" and given is None:
            return None
        whose = {"all": "", "group": group_of(account.user), "user": account.user}[self.mode]
        text = "\0".join((self.mode, whose, given or ""))  # no name has a NUL
        return hmac.digest(self._key, text.encode(), hashlib.sha256).hex()


def group_of(user: str) -> str:
    """What a user's name has before its first `:`, as in `research:alice`; else he is a group of his own."""
    return user.partition(":")[0] or user
