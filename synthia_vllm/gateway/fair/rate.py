"""How fast the engine serves when it is full: what predicted waits are made from."""

from collections.abc import Callable

_WINDOW_S = 1.0
_SMOOTHING = 0.2  # of each new window: the last five or so count


class ServiceRate:
    """Cost of tokens a second, measured while somebody was waiting: only then is the engine full."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.per_second: float | None = None
        self._clock = clock
        self._since: float | None = None
        self._served = 0.0

    def waiting(self, anybody: bool) -> None:
        """Told whenever the queue becomes empty or stops being so."""
        if not anybody:
            self._since = None
        elif self._since is None:
            self._since = self._clock()
            self._served = 0.0

    def add(self, cost: float) -> None:
        if self._since is None:
            return
        self._served += cost
        elapsed = self._clock() - self._since
        if elapsed < _WINDOW_S:
            return
        now = self._served / elapsed
        self.per_second = now if self.per_second is None else self.per_second + _SMOOTHING * (now - self.per_second)
        self._since += elapsed
        self._served = 0.0
