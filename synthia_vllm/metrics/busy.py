"""How busy the event loop is: the one thing of a gateway that more cores don't help."""

import time
from collections import deque
from collections.abc import Callable

import structlog

WINDOW_S = 60.0
MOST = 0.8  # beyond, who comes waits for the loop more and more

_log = structlog.get_logger(__name__)


class LoopBusy:
    """The share of the last minute in which the event loop's thread computed. One log line tells when it is too much.

    Only for the event loop's own thread: the processor's time is that of the thread that asks.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.thread_time
    ) -> None:
        self.share = 0.0
        self._clock = clock
        self._cpu = cpu
        self._noted: deque[tuple[float, float]] = deque()
        self._told = False

    def tick(self) -> None:
        """To be called each second."""
        now, noted = (self._clock(), self._cpu()), self._noted
        noted.append(now)
        while len(noted) > 2 and now[0] - noted[1][0] >= WINDOW_S:
            noted.popleft()
        seconds = now[0] - noted[0][0]
        self.share = (now[1] - noted[0][1]) / seconds if seconds > 0 else 0.0
        busy = seconds >= WINDOW_S and self.share > MOST
        if busy and not self._told:
            _log.warning(
                "event_loop_busy",
                share=round(self.share, 2),
                seconds=round(seconds),
                cure="one more process before the engines: --gateways N",
            )
        self._told = busy
