"""Which replica a request goes to."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from starlette.types import Scope

from synthia_vllm.cluster.replica import Replica
from synthia_vllm.gateway.call import call_of
from synthia_vllm.gateway.replies import header

Policy = Literal["affinity", "round_robin"]
# Of a text that starts a conversation: enough to tell one from another.
_PREFIX_CHARACTERS = 1024
_MAX_HOMES = 65_536  # conversations whose replica is remembered


class Affinity(NamedTuple):
    """What all requests of one conversation share, and whether an earlier one of it may have left its KV cache."""

    key: bytes
    continued: bool


def affinity_of(scope: Scope, request: Mapping[str, Any] | None) -> Affinity | None:
    """X-Session-Id, else how the conversation begins: the system message and the first user message.

    None for a request without a text; it goes where there is least to do. Users are kept apart.
    """
    call = call_of(scope)
    user = call.account.user if call else ""
    if session := header(scope, b"x-session-id"):
        return Affinity(_digest(user, session.decode("latin-1")), continued=True)
    beginning = _beginning(request) if request is not None else ""
    if not beginning:
        return None
    assert request is not None
    messages = request.get("messages", request.get("input"))
    continued = isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") == "assistant" for message in messages
    )
    return Affinity(_digest(user, beginning), continued)


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
    """Conversations stay on the replica that has their KV cache; the rest goes where there is least to do.

    A new conversation goes to the least busy replica, and that is remembered. One that another gateway began is found
    by rendezvous hashing (Thaler and Ravishankar, 1998), so that all gateways look for it at the same replica. Bounded
    load (Mirrokni et al., 2018): a replica with more than `max_load_factor` times the mean number of requests is passed
    over. `round_robin` looks at neither.
    """

    def __init__(self, policy: Policy, max_load_factor: float) -> None:
        self.policy = policy
        self.max_load_factor = max_load_factor
        self._turn = 0
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def pick(self, candidates: Iterable[Replica], affinity: Affinity | None) -> Replica | None:
        """One of the replicas, or None of none."""
        replicas = list(candidates)
        if not replicas:
            return None
        self._turn += 1
        if self.policy == "round_robin":
            return replicas[self._turn % len(replicas)]
        if affinity is None:
            return self._least_busy(replicas)
        bound = math.ceil(self.max_load_factor * (sum(r.in_flight for r in replicas) + 1) / len(replicas))
        fitting = [replica for replica in replicas if replica.in_flight < bound]
        home = self._homes.get(affinity.key)
        found = next((replica for replica in fitting if replica.name == home), None)
        if found is None and home is None and affinity.continued:
            found = max(fitting, key=lambda replica: _digest(replica.name, affinity.key.hex()))
        found = found or self._least_busy(replicas)
        self._remember(affinity.key, found.name)
        return found

    def _least_busy(self, replicas: list[Replica]) -> Replica:
        """Equally busy ones in turn."""
        turned = replicas[self._turn % len(replicas) :] + replicas[: self._turn % len(replicas)]
        return min(turned, key=lambda replica: replica.in_flight)

    def _remember(self, key: bytes, name: str) -> None:
        self._homes[key] = name
        self._homes.move_to_end(key)
        if len(self._homes) > _MAX_HOMES:
            self._homes.popitem(last=False)


def _digest(user: str, text: str) -> bytes:
    return hashlib.blake2b(f"{user}\0{text}".encode(), digest_size=8).digest()
