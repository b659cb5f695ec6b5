"""Which replica a request goes to."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

from synthia_vllm.engine.port import Affinity
from synthia_vllm.replicas.replica import Replica

Policy = Literal["affinity", "round_robin"]
_MAX_HOMES = 65_536  # conversations whose replica is remembered


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
            found = max(fitting, key=lambda replica: _weight(replica.name, affinity.key))
        found = found or self._least_busy(replicas)
        self._remember(affinity.next or affinity.key, found.name)
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


def _weight(name: str, key: bytes) -> bytes:
    return hashlib.blake2b(f"{name}\0{key.hex()}".encode(), digest_size=8).digest()
