"""The last 15 minutes in steps of 5 s, for the charts of the live view, and what came of the last requests."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from synthia_vllm.metrics import series
from synthia_vllm.metrics.growth import COUNTERS, Growth, Totals
from synthia_vllm.metrics.recorder import LATENCIES, LIVE_LATENCY, LIVE_RESULTS, RESULTS, Tables
from synthia_vllm.metrics.sketch import BOUNDS, quantiles

STEP_S = 5.0
STEPS = 180
RECENT_STEPS = 60  # five minutes
_SHOWN = (("p50", 0.5), ("p99", 0.99))
_COUNTED = (*RESULTS, *COUNTERS)
_NONE = [0] * (len(BOUNDS) + 1)
_TOKENS = {"prompt_per_s": series.PROMPT_TOKENS, "generation_per_s": series.GENERATION_TOKENS}


@dataclass(slots=True)
class _Counted:
    """Of all time: tokens, results, and latencies by bucket."""

    tokens: dict[str, float] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    latencies: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, tables: Tables) -> "_Counted":
        return cls(
            {name: sum(cell.value for cell in tables[family.name].cells.values()) for name, family in _TOKENS.items()},
            {name: cell.value for (name,), cell in tables[LIVE_RESULTS.name].cells.items()},
            {name: list(cell.counts) for (name,), cell in tables[LIVE_LATENCY.name].cells.items()},
        )


class History:
    """A bounded ring of points, each over the step before it: of all gateways whose counts the tables are.

    The quantiles are of the requests and gaps of that step; None where there were none. What a gateway finds counted
    by others when it starts is of no step: `begun` is false for it, and its first step makes no point.
    """

    def __init__(
        self,
        tables: Callable[[], Tables],
        *,
        begun: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._tables = tables
        self._clock = clock
        self._unix = unix
        self._points: deque[dict[str, float | None]] = deque(maxlen=STEPS)
        self._at = clock()
        self._before = _Counted() if begun else None
        self._growth = Growth()

    def step(self, running: float | None, queued: float, engines: Mapping[str, Totals] | None = None) -> None:
        """To be called every STEP_S; the rates are over the time that it really was.

        `running` is None where no replica can. `engines`: see `Growth`.
        """
        now, counted, before = self._clock(), _Counted.of(self._tables()), self._before
        seconds = max(now - self._at, 1e-3)
        grown = self._growth.since(engines or {})
        self._at, self._before = now, counted
        if before is None:
            return
        point: dict[str, float | None] = {"at": self._unix()}
        for name, served in counted.tokens.items():
            point[name] = max(0.0, served - before.tokens.get(name, 0)) / seconds
        point |= {"running": running, "queued": queued}
        for name, counts in counted.latencies.items():
            new = [max(0, count - had) for count, had in zip(counts, before.latencies.get(name, _NONE), strict=True)]
            found = quantiles(new, *(share for _, share in _SHOWN))
            point |= {f"{name}_{shown}": value for (shown, _), value in zip(_SHOWN, found, strict=True)}
        point |= {name: max(0, count - before.results.get(name, 0)) for name, count in counted.results.items()}
        self._points.append(point | grown)

    def as_dict(self) -> dict[str, Any]:
        """A list for each figure, all of one length."""
        names = ["at", "prompt_per_s", "generation_per_s", "running", "queued"]
        names += [f"{name}_{shown}" for name in LATENCIES for shown, _ in _SHOWN]
        return {"step_s": STEP_S} | {name: [point[name] for point in self._points] for name in names}

    def recent(self) -> dict[str, float | None]:
        """What was counted in the last five minutes; None where nobody tells."""
        last = list(islice(reversed(self._points), RECENT_STEPS))
        found: dict[str, float | None] = {"window_s": RECENT_STEPS * STEP_S}
        for name in _COUNTED:
            told = [value for point in last if (value := point[name]) is not None]
            found[name] = sum(told) if told else None
        return found
