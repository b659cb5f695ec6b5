"""All of Ray Serve that we use without its promise, in one place. Checked on Ray 2.60.0.

`tests/cluster/test_private_ray.py` fails when one of these moves. What they are for: Serve tells its own HAProxy
which replicas of an application run and where; it offers nobody else that. And Ray keeps small values for its own
components in the GCS, which is alive as long as the cluster is.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollNamespace, LongPollState

CHECKED_ON = "2.60.0"


class LocalModelCallback(CallbackBase):  # type: ignore[misc]
    """Keeps `ray.serve.llm` from starting another process only to find that the model is a folder or a hub id.

    That process imports vLLM, which on a small machine costs every replica's start several seconds.
    """

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


async def next_target_groups(seen: int) -> tuple[int, list[Any]] | None:
    """Waits until Serve's list of targets differs from the one numbered `seen`; None where it did not for a while.

    Of all applications; -1 gets the list at once. Raises what Ray raises while the controller is away.
    """
    # In a thread: it asks the GCS, and waits where that is away.
    controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    changes = await controller.listen_for_change.remote({LongPollNamespace.TARGET_GROUPS: seen})
    if changes == LongPollState.TIME_OUT or not changes:
        return None
    change = changes[LongPollNamespace.TARGET_GROUPS]
    return change.snapshot_id, change.object_snapshot


class Board:
    """Small values that every process of the cluster can read; kept by Ray's GCS. Calls block on the network."""

    def __init__(self, name: str) -> None:
        self._namespace = name.encode()

    def put(self, key: str, value: bytes) -> None:
        _internal_kv_put(key.encode(), value, overwrite=True, namespace=self._namespace)

    def read(self) -> Mapping[str, bytes]:
        keys = _internal_kv_list(b"", namespace=self._namespace)
        found = {key.decode(): _internal_kv_get(key, namespace=self._namespace) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def remove(self, key: str) -> None:
        _internal_kv_del(key.encode(), namespace=self._namespace)
