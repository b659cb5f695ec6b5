"""An event loop whose clock jumps to the next timer when there is nothing to do.

What takes seconds takes none, and what happens when depends on no machine. For code that asks the loop for the time and
runs no threads.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_TURN_S = 1e-6  # of the loop: what it takes can't be nothing, or a clock that is read in steps never leaves one


class _Selector(selectors.SelectSelector):
    """Waits for nothing, and tells how long it would have waited."""

    slept = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise RuntimeError("all tasks wait for something that never comes")
            self.slept += timeout
        self.slept += _TURN_S
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._waits = _Selector()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.slept


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in a time of its own that begins at 0."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)
