"""Which replicas of the engine run, and where, as Ray Serve sees it."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog

from synthia_vllm.cluster.private_ray import next_target_groups

_ALL = -1  # have seen no list yet
_ASK_AGAIN_S = 1.0
# A controller that starts anew finds its replicas again one by one. Until then it knows less than we do.
_RECOVERY_S = 30.0
_log = structlog.get_logger(__name__)


class ServeDiscovery:
    """Follows the running replicas of one application.

    Serve's controller pushes every change to whoever listens (its HAProxy does as well): a replica that is to stop is
    off the list a tenth of a second after that was decided. A replica that died is found by the pool itself, which sees
    its connections break. While the controller is away the last list stands.
    """

    def __init__(self, application: str, route_prefix: str) -> None:
        self._application = application
        self._prefix = route_prefix.rstrip("/")
        self._listed: dict[str, str] = {}

    async def run(self, update: Callable[[Mapping[str, str]], None]) -> None:
        """Calls `update` with name and URL of each replica, now and after each change, until cancelled."""
        loop = asyncio.get_running_loop()
        seen, lost_at = _ALL, -_RECOVERY_S
        while True:
            try:
                change = await next_target_groups(seen)
            except Exception as error:  # Ray's errors have no common base that says "away"
                _log.warning("controller_away", error=type(error).__name__)
                seen, lost_at = _ALL, loop.time()
                await asyncio.sleep(_ASK_AGAIN_S)
                continue
            if change is None:
                continue
            seen, groups = change
            found = replica_urls(groups, self._application, self._prefix)
            if loop.time() - lost_at < _RECOVERY_S:
                self._tell(self._listed | found, update)
                seen = _ALL
                await asyncio.sleep(_ASK_AGAIN_S)
            else:
                self._tell(found, update)

    def _tell(self, found: dict[str, str], update: Callable[[Mapping[str, str]], None]) -> None:
        if found != self._listed:
            self._listed = found
            update(found)


def replica_urls(groups: Iterable[Any], application: str, prefix: str) -> dict[str, str]:
    """Name and base URL of an application's replicas, from Serve's target groups. gRPC targets are left out."""
    return {
        target.name: f"http://{target.ip}:{target.port}{prefix}"
        for group in groups
        if group.app_name == application and str(group.protocol.value).upper() == "HTTP"
        for target in group.targets
    }
