"""How much a gateway may ask again."""

import random
from collections.abc import Callable

_LEAST = 64  # requests that may be asked again at once, whatever is under way
_PERIOD_S = 10.0
_MOST_S = 10.0


class RetryBudget:
    """Lets the requests of one lost replica go on at once, and keeps a dying cluster from being hammered.

    Within ten seconds as many may be asked again as are under way; those beyond wait, each for a random part of the
    time until the budget is there again ("full jitter": Brooker, AWS Architecture Blog, 2015).
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spent = 0.0
        self._at = clock()

    def delay(self, in_flight: int) -> float:
        """Seconds to wait before one more is asked again."""
        now, allowed = self._clock(), max(_LEAST, in_flight)
        self._spent = max(0.0, self._spent - (now - self._at) * allowed / _PERIOD_S) + 1
        self._at = now
        over = self._spent - allowed
        return random.uniform(0, min(_MOST_S, over * _PERIOD_S / allowed)) if over > 0 else 0.0
