"""How many replicas the engine needs: a Serve autoscaling policy on tokens instead of requests.

Requests differ by orders of magnitude; what fills a replica is its KV cache. Serve's own wrapper around a policy keeps
`min_replicas` and `max_replicas` and the delays in both directions; this decides only what the load asks for.
"""

import contextlib
import math
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from synthia_vllm.cluster.load import FRESH_S, Load, LoadReader

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# One less has to be enough with so much to spare before one goes: else the load of n replicas that is just below the
# target would be the load of n - 1 that is just above it, and replicas would come and go.
_SPARE = 0.15
_READ_PERIOD_S = 1.0


def replicas_for(load: Load, current: int, target_load: float) -> int:
    """How many replicas the load asks for, where there are `current`.

    At `target_load` of what the KV caches hold, running and queued tokens together. At least one as long as there is
    any request, whatever its size; none without.
    """
    if not load.requests:
        return 0
    if not load.tokens_per_replica:
        return max(current, 1)  # none has ever run: what one holds is known when the first is up
    needed = (load.tokens + load.queued_tokens) / (load.tokens_per_replica * target_load)
    enough = max(1, math.ceil(needed))
    if enough >= current:
        return enough
    with_spare = max(1, math.ceil(needed / (1 - _SPARE)))
    return min(current, with_spare)


class _Follower:
    """Reads the gateways' load once a second in a thread of its own, until nobody refers to it any more."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self._read_at = 0.0
        threading.Thread(target=self._run, args=(weakref.ref(self),), name="synthia-load", daemon=True).start()

    def fresh(self) -> Load | None:
        return self._load if time.monotonic() - self._read_at <= FRESH_S else None

    @staticmethod
    def _run(owner: "weakref.ref[_Follower]") -> None:
        reader = LoadReader()
        while owner() is not None:
            with contextlib.suppress(Exception):  # the GCS is away: what was read last ages out
                load, now = reader.read(), time.monotonic()
                if (follower := owner()) is not None:
                    follower._load, follower._read_at = load, now
                del follower
            time.sleep(_READ_PERIOD_S)


class TokenLoadPolicy:
    """The policy as Serve calls it, ten times a second, in its controller. Never blocks there.

    With no fresh word from any gateway the number of replicas stays what it is.
    """

    def __init__(self, target_load: float) -> None:
        self._target_load = target_load
        self._follower: _Follower | None = None

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        if self._follower is None:  # not in __init__: Serve also makes policies where nothing is scaled
            self._follower = _Follower()
        load = self._follower.fresh()
        target: int = context.target_num_replicas
        wanted = target if load is None else replicas_for(load, target, self._target_load)
        # What is still starting is not taken away again: its start would be for nothing, and the next one as slow.
        starts = len(context.running_replicas) < target
        return (max(wanted, target) if starts else wanted), {}
