"""Which replica a request goes to."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from starlette.types import Scope

from synthia_vllm.cluster.replica import Replica
from synthia_vllm.gateway.call import call_of
from synthia_vllm.gateway.replies import header

Policy = Literal["affinity", "round_robin"]
# Of a text that starts a conversation: enough to tell one from another.
_PREFIX_CHARACTERS = 1024


def affinity_key(scope: Scope, request: Mapping[str, Any] | None) -> str | None:
    """What all requests of one conversation share: X-Session-Id, else how the conversation begins.

    A conversation's later turns repeat its beginning: the system message and the first user message. None for a
    request that has neither; it goes where there is least to do. Users are kept apart.
    """
    call = call_of(scope)
    user = call.account.user if call else ""
    if session := header(scope, b"x-session-id"):
        return f"{user}\0{session.decode('latin-1')}"
    if request is None:
        return None
    beginning = _beginning(request)
    return f"{user}\0{beginning}" if beginning else None


def _beginning(request: Mapping[str, Any]) -> str:
    messages = request.get("messages", request.get("input"))
    if isinstance(messages, list):
        first: list[Any] = [request.get("system"), request.get("instructions")]
        for message in messages:
            first.append(message)
            if isinstance(message, dict) and message.get("role") == "user":
                break
        return str(first)[:_PREFIX_CHARACTERS]
    given = request.get("prompt", messages)
    return str(given[:_PREFIX_CHARACTERS]) if isinstance(given, str | list) else ""


class Router:
    """Affinity by rendezvous hashing with bounded load, least busy where there is no key; or plain round robin.

    Rendezvous hashing (Thaler and Ravishankar, 1998): each replica has a rank of its own for each key, so that a
    replica that comes or goes moves only its own share of the conversations. Bounded load (Mirrokni et al., 2018): a
    replica with more than `max_load_factor` times the mean number of requests is passed over.
    """

    def __init__(self, policy: Policy, max_load_factor: float) -> None:
        self.policy = policy
        self.max_load_factor = max_load_factor
        self._turn = 0

    def pick(self, candidates: Iterable[Replica], key: str | None) -> Replica | None:
        """One of the replicas, or None of none."""
        replicas = list(candidates)
        if not replicas:
            return None
        self._turn += 1
        if self.policy == "round_robin":
            return replicas[self._turn % len(replicas)]
        if key is not None:
            bound = math.ceil(self.max_load_factor * (sum(r.in_flight for r in replicas) + 1) / len(replicas))
            fitting = [replica for replica in replicas if replica.in_flight < bound]
            return max(fitting, key=lambda replica: _rank(replica.name, key))
        # Equally busy ones in turn.
        turned = replicas[self._turn % len(replicas) :] + replicas[: self._turn % len(replicas)]
        return min(turned, key=lambda replica: replica.in_flight)


def _rank(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
