"""The last 15 minutes in steps of 5 s, for the charts of the live view."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from synthia_vllm.metrics.cells import quantile
from synthia_vllm.metrics.recorder import Recorder

STEP_S = 5.0
STEPS = 180
_SHOWN = (("p50", 0.5), ("p99", 0.99))


class History:
    """A bounded ring of points, each over the step before it.

    The quantiles are of the requests and gaps of that step, from the histograms' buckets; None where there were none.
    """

    def __init__(self, recorder: Recorder, *, unix: Callable[[], float] = time.time) -> None:
        self._recorder = recorder
        self._unix = unix
        self._points: deque[dict[str, float | None]] = deque(maxlen=STEPS)
        self._at = recorder.clock()
        self._counts = self._now()
        self._tokens = self._served()

    def step(self, running: int, queued: int) -> None:
        """To be called every STEP_S; the rates are over the time that it really was."""
        now, counts, tokens = self._recorder.clock(), self._now(), self._served()
        seconds = max(now - self._at, 1e-3)
        point: dict[str, float | None] = {"at": self._unix()}
        for name, served in tokens.items():
            point[name] = max(0.0, served - self._tokens[name]) / seconds
        point |= {"running": running, "queued": queued}
        for name, (bounds, after) in counts.items():
            new = [b - a for a, b in zip(self._counts[name][1], after, strict=True)]
            for shown, q in _SHOWN:
                point[f"{name}_{shown}"] = quantile(bounds, new, q)
        self._points.append(point)
        self._at, self._counts, self._tokens = now, counts, tokens

    def as_dict(self) -> dict[str, Any]:
        """A list for each figure, all of one length."""
        names = ["at", "prompt_per_s", "generation_per_s", "running", "queued"]
        names += [f"{name}_{shown}" for name in self._counts for shown, _ in _SHOWN]
        return {"step_s": STEP_S} | {name: [point[name] for point in self._points] for name in names}

    def _now(self) -> dict[str, tuple[tuple[float, ...], list[int]]]:
        recorder = self._recorder
        found = {"ttft": recorder.first_token, "queue": recorder.queue_wait, "itl": recorder.gaps}
        counts = {name: (table.family.buckets, table.total()) for name, table in found.items()}
        engine = recorder.engine_first_token
        return counts | {"engine": (engine.bounds, list(engine.counts))}

    def _served(self) -> dict[str, float]:
        tables = {"prompt_per_s": self._recorder.prompt_tokens, "generation_per_s": self._recorder.generation_tokens}
        return {name: sum(cell.value for cell in table.cells.values()) for name, table in tables.items()}
