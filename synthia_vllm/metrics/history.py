"""The last 15 minutes in steps of 5 s, for the charts of the live view, and what came of the last requests."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from synthia_vllm.metrics.growth import COUNTERS, Growth, Totals
from synthia_vllm.metrics.recorder import RESULTS, Recorder

STEP_S = 5.0
STEPS = 180
RECENT_STEPS = 60  # five minutes
_SHOWN = (("p50", 0.5), ("p99", 0.99))
_COUNTED = (*RESULTS, *COUNTERS)


class History:
    """A bounded ring of points, each over the step before it.

    The quantiles are of the requests and gaps of that step, from the recorder's sketches, which begin anew with each
    step; None where there were none.
    """

    def __init__(self, recorder: Recorder, *, unix: Callable[[], float] = time.time) -> None:
        self._recorder = recorder
        self._unix = unix
        self._points: deque[dict[str, float | None]] = deque(maxlen=STEPS)
        self._at = recorder.clock()
        self._tokens = self._served()
        self._results = dict(recorder.results)
        self._growth = Growth()

    def step(self, running: int | None, queued: int, engines: Mapping[str, Totals] | None = None) -> None:
        """To be called every STEP_S; the rates are over the time that it really was.

        `running` is None where no replica can. `engines`: see `Growth`.
        """
        recorder, now, tokens = self._recorder, self._recorder.clock(), self._served()
        seconds = max(now - self._at, 1e-3)
        point: dict[str, float | None] = {"at": self._unix()}
        for name, served in tokens.items():
            point[name] = max(0.0, served - self._tokens[name]) / seconds
        point |= {"running": running, "queued": queued}
        for name, sketch in recorder.latencies.items():
            quantiles = sketch.take(*(q for _, q in _SHOWN))
            point |= {f"{name}_{shown}": value for (shown, _), value in zip(_SHOWN, quantiles, strict=True)}
        point |= {name: count - self._results[name] for name, count in recorder.results.items()}
        point |= self._growth.since(engines or {})
        self._points.append(point)
        self._at, self._tokens, self._results = now, tokens, dict(recorder.results)

    def as_dict(self) -> dict[str, Any]:
        """A list for each figure, all of one length."""
        names = ["at", "prompt_per_s", "generation_per_s", "running", "queued"]
        names += [f"{name}_{shown}" for name in self._recorder.latencies for shown, _ in _SHOWN]
        return {"step_s": STEP_S} | {name: [point[name] for point in self._points] for name in names}

    def recent(self) -> dict[str, float | None]:
        """What was counted in the last five minutes; None where nobody tells."""
        last = list(islice(reversed(self._points), RECENT_STEPS))
        found: dict[str, float | None] = {"window_s": RECENT_STEPS * STEP_S}
        for name in _COUNTED:
            told = [value for point in last if (value := point[name]) is not None]
            found[name] = sum(told) if told else None
        return found

    def _served(self) -> dict[str, float]:
        tables = {"prompt_per_s": self._recorder.prompt_tokens, "generation_per_s": self._recorder.generation_tokens}
        return {name: sum(cell.value for cell in table.cells.values()) for name, table in tables.items()}
