"""Service level objectives: which requests met their targets, and how fast the budget of missed ones burns."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from synthia_vllm.settings import SloTargets

# Windows of the burn rate (Google's SRE workbook, *Alerting on SLOs*, multiwindow: a long one and a short one).
WINDOWS_S = {"5m": 300, "1h": 3600, "6h": 6 * 3600}
_STEP_S = 30.0


def meets(targets: SloTargets, ttft: float | None, itl: float | None, e2e: float) -> bool:
    """Seconds; None is what a reply has not (one that is not streamed has no first token of its own)."""
    found = ((targets.ttft_s, ttft), (targets.itl_s, itl), (targets.e2e_s, e2e))
    return all(target is None or value is None or value <= target for target, value in found)


class Budget:
    """Requests that met and missed over the last six hours, in steps of half a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[list[float]] = deque()  # start, met, missed

    def add(self, met: bool) -> None:
        now = self._clock()
        if not self._steps or now - self._steps[-1][0] >= _STEP_S:
            self._steps.append([now, 0, 0])
            while now - self._steps[0][0] > max(WINDOWS_S.values()):
                self._steps.popleft()
        self._steps[-1][1 if met else 2] += 1

    def windows(self) -> Iterator[tuple[str, float, float]]:
        """Each window, and how many met and missed in it."""
        now = self._clock()
        for name, seconds in WINDOWS_S.items():
            steps = [step for step in self._steps if now - step[0] <= seconds]
            yield name, sum(step[1] for step in steps), sum(step[2] for step in steps)


def burn_rate(met: float, missed: float, objective: float) -> float | None:
    """Missed requests over those that may be missed: at 1 the budget is used up just in time.

    None where there were no requests.
    """
    return missed / (met + missed) / (1 - objective) if met + missed else None
