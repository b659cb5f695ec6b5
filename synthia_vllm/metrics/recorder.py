"""All that the gateway counts, in one place: what `/metrics` and the live view are made from."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Cap, Counts, Histograms, Table, single
from synthia_vllm.metrics.rates import TokenRates
from synthia_vllm.metrics.series import Family
from synthia_vllm.metrics.sketch import BOUNDS, Sketch
from synthia_vllm.metrics.slo import Budget
from synthia_vllm.prompt import MODEL_ALIASES
from synthia_vllm.settings import MetricsSettings, SloSettings

RESULTS = ("requests", "failed", "refused")  # what the live view counts: all that ended, and of them those
LATENCIES = ("ttft", "queue", "engine", "itl")  # `queue` and `engine` are the two parts of `ttft`
Tables = Mapping[str, Any]  # Counts or Histograms, by the names of their families

# For the live view; on no page.
LIVE_RESULTS = Family("live_results", "counter", ("result",), "Requests by RESULTS.")
LIVE_LATENCY = Family("live_latency_seconds", "histogram", ("name",), "Latencies, to a percent.", BOUNDS)
LIVE_SLO = Family("live_slo", "gauge", ("window", "result"), "Requests that met and missed, by window.")


@dataclass(slots=True)
class Waiting:
    """Requests of all users at this moment, from the queue."""

    in_flight: dict[str, int]
    queued: dict[str, int]


class Recorder:
    """The tables of all series, and the names that labels may have. Used from one event loop."""

    def __init__(
        self, settings: MetricsSettings, slo: SloSettings, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self.slo = slo
        self.users = Cap(settings.max_users)
        self.models = Cap(settings.max_models, tuple(MODEL_ALIASES))
        self.rates = TokenRates(clock)
        self.budget = Budget(clock)
        self.requests = Counts(series.REQUESTS)
        self.prompt_tokens = Counts(series.PROMPT_TOKENS)
        self.generation_tokens = Counts(series.GENERATION_TOKENS)
        self._user_histograms = settings.user_histograms
        self.first_token = self._latency(series.TIME_TO_FIRST_TOKEN)
        self.gaps = self._latency(series.INTER_TOKEN_LATENCY)
        self.duration = self._latency(series.REQUEST_DURATION)
        self.queue_wait = self._latency(series.QUEUE_WAIT)
        self.service = Counts(series.FAIR_SERVICE)
        self.rejections = Counts(series.REJECTIONS)
        self.slo_requests = Counts(series.SLO_REQUESTS)
        # For the live view only.
        self.latencies = {name: Sketch() for name in LATENCIES}
        self.results = dict.fromkeys(RESULTS, 0)

    def user(self, name: str) -> str:
        return self.users.admit(name)

    def model(self, name: str, answered: bool) -> str:
        """A client can ask for any name; one is known once the engine has answered to it."""
        return self.models.admit(name) if answered else self.models.known(name)

    def latency_labels(self, model: str, user: str) -> tuple[str, ...]:
        """Those of the histograms."""
        return (model, user) if self._user_histograms else (model,)

    def judge(self, user: str, met: bool) -> None:
        # Both are there from the first on: a ratio needs its zero.
        results = {result: self.slo_requests.cell(user, result) for result in ("met", "missed")}
        results["met" if met else "missed"].value += 1
        self.budget.add(met)

    def tables(self, waiting: Waiting) -> Iterable[Table]:
        """In the order of the docs."""
        return (
            self.requests,
            self.prompt_tokens,
            self.generation_tokens,
            self.first_token,
            self.gaps,
            self.duration,
            self.queue_wait,
            self.rates.table(),
            self._by_user(series.REQUESTS_IN_FLIGHT, waiting.in_flight),
            self._by_user(series.REQUESTS_QUEUED, waiting.queued),
            self.service,
            self.rejections,
            self.slo_requests,
            single(series.SLO_OBJECTIVE, self.slo.objective),
        )

    def live_tables(self) -> Iterable[Table]:
        """What the live view shows beside the series."""
        results, latencies, slo = Counts(LIVE_RESULTS), Histograms(LIVE_LATENCY), Counts(LIVE_SLO)
        for result, number in self.results.items():
            results.cell(result).value = number
        for name, sketch in self.latencies.items():
            latencies.cells[name,] = sketch
        for window, met, missed in self.budget.windows():
            slo.cell(window, "met").value, slo.cell(window, "missed").value = met, missed
        return results, latencies, slo

    def _latency(self, family: series.Family) -> Histograms:
        return Histograms(replace(family, labels=self.latency_labels("model", "user")))

    def _by_user(self, family: series.Family, numbers: dict[str, int]) -> Counts:
        """Zero for those who have none now: a gauge that goes and comes looks like an outage."""
        sums = Counter(dict.fromkeys(self.users.names, 0))
        for user, number in numbers.items():
            sums[self.user(user)] += number
        found = Counts(family)
        for user, number in sums.items():
            found.cell(user).value = number
        return found
