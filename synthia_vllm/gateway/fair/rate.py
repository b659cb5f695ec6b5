"""How fast the engine serves when it is full: what predicted waits are made from."""

from collections.abc import Callable

_WINDOW_S = 1.0
_KEPT = 0.9  # of what was known, after each second: the last ten or so count


class ServiceRate:
    """Cost of tokens a second, measured while somebody was waiting: only then is the engine full."""

    __slots__ = ("_clock", "_since", "_then", "per_second", "served")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.per_second: float | None = None
        self.served = 0.0  # in all; whoever serves adds to it
        self._clock = clock
        self._since: float | None = None
        self._then = 0.0  # served until then

    def look(self, waiting: bool) -> None:
        """Told, now and then, whether somebody waits."""
        if not waiting:
            self._since = None
            return
        now = self._clock()
        if self._since is None:
            self._since, self._then = now, self.served
            return
        elapsed = now - self._since
        if elapsed < _WINDOW_S:
            return
        found = (self.served - self._then) / elapsed
        if self.per_second is None:
            self.per_second = found
        else:
            self.per_second = found + _KEPT**elapsed * (self.per_second - found)
        self._since, self._then = now, self.served
