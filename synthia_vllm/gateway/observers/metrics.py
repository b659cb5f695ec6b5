"""What a client gets, and when: measured on the last step before the socket, for the exporter.

A chunk's gap is counted as `vllm bench serve` (0.29) counts it: from the chunk before, one observation a chunk however
many tokens it brings; chunks that go out together have a gap and zeros. Unlike there, a chunk without tokens (the role
at a chat's start, the usage at its end) is none. All of it costs well under 3 µs a chunk (benchmarks/exporter.py).
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.request import POLLED, Exchange, Observer
from synthia_vllm.metrics.cells import Count, Histogram
from synthia_vllm.metrics.rates import Tokens
from synthia_vllm.metrics.recorder import Recorder
from synthia_vllm.metrics.series import LOCAL
from synthia_vllm.metrics.sketch import BOUNDS
from synthia_vllm.metrics.slo import meets

_LIMITS = frozenset(limit.name for limit in fields(UserLimits))  # also the reason of a 400: it would never get in


class Metrics(Observer):
    """An observer that counts into a recorder. Prices and targets hold for all exchanges."""

    def __init__(self, recorder: Recorder, *, prompt_cost: float = 1.0, generated_cost: float = 2.0) -> None:
        self.recorder = recorder
        self.prompt_cost = prompt_cost
        self.generated_cost = generated_cost
        self._open: dict[str, Delivery] = {}

    def opened(self, exchange: Exchange) -> None:
        self._open[exchange.id] = Delivery(self, exchange, self.recorder.clock)

    def sent(self, exchange: Exchange, chunks: int, tokens: int) -> None:
        self._open[exchange.id].sent(chunks, tokens)

    def ended(self, exchange: Exchange) -> None:
        delivery = self._open.pop(exchange.id)
        if exchange.route not in POLLED:
            delivery.end()


@dataclass(slots=True, eq=False)
class Delivery:
    """One reply on its way out."""

    _metrics: Metrics
    _exchange: Exchange
    _clock: Callable[[], float]
    _user: str = ""  # label; empty until it is known
    _model: str = ""
    _replica: str = ""
    _cost: float = 0.0  # of a generated token, over the user's weight
    _generated: int = 0  # tokens counted
    _prompt: int = 0
    _first: float = 0.0
    _last: float = 0.0
    _longest: float = 0.0
    _waited: bool = False
    _bound: bool = False
    _latency_labels: tuple[str, ...] = ()
    # Once the first token is out:
    _gaps: Histogram = field(init=False)
    _gap_counts: list[int] = field(init=False)
    _gap_bounds: tuple[float, ...] = field(init=False)
    _fine_gaps: list[int] = field(init=False)  # of the live view
    _generation: Count = field(init=False)
    _service: Count = field(init=False)
    _tokens: Tokens = field(init=False)

    def sent(self, chunks: int, tokens: int) -> None:
        """So many chunks went out together. Nothing in here may wait or be slow."""
        now = self._clock()
        if self._first:
            gap = now - self._last
            self._gap_counts[bisect_left(self._gap_bounds, gap)] += 1
            self._gaps.sum += gap
            self._fine_gaps[bisect_left(BOUNDS, gap)] += 1
            if gap > self._longest:  # noqa: PLR1730  (max() takes three times as long)
                self._longest = gap
        else:
            self._begin(now)
        self._last = now
        if chunks > 1:
            self._gap_counts[0] += chunks - 1
            self._fine_gaps[0] += chunks - 1
        self._add_generated(tokens)

    def end(self) -> None:
        exchange, recorder = self._exchange, self._metrics.recorder
        usage = exchange.usage
        self._name()
        if usage.accepted:
            self._bind()
            self._add_prompt(usage.billed_prompt - self._prompt)
            here = max(0, usage.generated - usage.resumed)  # the gateway that had the reply before counted the rest
            if here > self._generated:
                self._add_generated(here - self._generated)
        recorder.requests.cell(self._user, self._model, exchange.route_name, exchange.outcome).value += 1
        if exchange.outcome == "rejected":
            recorder.rejections.cell(self._user, exchange.reason or "engine").value += 1
        self._count_result()
        if exchange.request is None:
            return
        if usage.dispatched is not None and exchange.status < 400:
            self._observe_wait()
            if exchange.outcome == "finished":
                duration = recorder.duration.cell(*self._latency_labels)
                duration.observe((exchange.ended or self._clock()) - exchange.arrived, exchange.request_id)
        if self._longest:
            self._gaps.exemplify(self._longest, exchange.request_id)
        met = self._met()
        if met is not None:
            recorder.judge(self._user, met)

    def _begin(self, now: float) -> None:
        """The first token is out."""
        exchange = self._exchange
        self._name()
        self._bind()
        self._first = now
        recorder = self._metrics.recorder
        recorder.first_token.cell(*self._latency_labels).observe(now - exchange.arrived, exchange.request_id)
        recorder.latencies["ttft"].observe(now - exchange.arrived)
        recorder.latencies["engine"].observe(now - (exchange.usage.dispatched or exchange.arrived))
        self._gaps = recorder.gaps.cell(*self._latency_labels)
        self._gap_counts, self._gap_bounds = self._gaps.counts, self._gaps.bounds
        self._fine_gaps = recorder.latencies["itl"].counts
        self._observe_wait()
        if exchange.request is not None and exchange.request.prepared.exact:
            self._add_prompt(exchange.usage.prompt)

    def _name(self) -> None:
        """The labels, when it is known who asked what and whether the engine knew it."""
        if not self._user:
            exchange, recorder = self._exchange, self._metrics.recorder
            self._user = recorder.user(exchange.account.user)
            self._model = recorder.model(exchange.model, answered=exchange.usage.accepted)
            self._latency_labels = recorder.latency_labels(self._model, self._user)

    def _bind(self) -> None:
        if self._bound:
            return
        self._bound = True
        exchange, metrics = self._exchange, self._metrics
        recorder = metrics.recorder
        self._cost = metrics.generated_cost / exchange.account.weight
        self._generation = recorder.generation_tokens.cell(self._user, self._model)
        self._service = recorder.service.cell(self._user)
        self._tokens = recorder.rates.tokens(self._model, exchange.usage.replica or LOCAL)
        self._replica = exchange.usage.replica

    def _add_generated(self, tokens: int) -> None:
        replica = self._exchange.usage.replica
        if replica is not self._replica:  # it went on elsewhere
            self._replica = replica
            self._tokens = self._metrics.recorder.rates.tokens(self._model, replica or LOCAL)
        self._generated += tokens
        self._generation.value += tokens
        self._service.value += tokens * self._cost
        self._tokens.generation += tokens

    def _add_prompt(self, tokens: int) -> None:
        if tokens <= 0:
            return
        metrics = self._metrics
        self._prompt += tokens
        metrics.recorder.prompt_tokens.cell(self._user, self._model).value += tokens
        self._service.value += tokens * metrics.prompt_cost / self._exchange.account.weight
        self._tokens.prompt += tokens

    def _observe_wait(self) -> None:
        exchange = self._exchange
        if not self._waited:
            self._waited = True
            recorder = self._metrics.recorder
            recorder.queue_wait.cell(*self._latency_labels).observe(exchange.queue_wait, exchange.request_id)
            recorder.latencies["queue"].observe(exchange.queue_wait)

    def _count_result(self) -> None:
        """Of what was asked to generate, or to count. What a client got wrong is no error, and no refusal of ours."""
        exchange, results = self._exchange, self._metrics.recorder.results
        if exchange.method != "POST" or exchange.route_name == "/admin":
            return
        results["requests"] += 1
        if exchange.status in (429, 503) or exchange.reason in _LIMITS:
            results["refused"] += 1
        elif exchange.outcome in ("failed", "stopped") or exchange.status >= 500:
            results["failed"] += 1

    def _met(self) -> bool | None:
        """Whether its targets were met; None where that is not the service's doing.

        Missed: what broke, what we refused for want of room (503), and what was late when its client left. Not judged:
        a client's own mistakes and limits, and one that left while all was well.
        """
        exchange = self._exchange
        if exchange.outcome in ("failed", "stopped") or exchange.status >= 500:
            return False
        if exchange.status >= 400:
            return None
        slo = self._metrics.recorder.slo
        targets = slo.batch if exchange.account.priority == "batch" else slo.interactive
        now = exchange.ended or self._clock()
        more = self._generated - 1
        itl = (self._last - self._first) / more if self._first and more > 0 else None
        ttft = self._first - exchange.arrived if self._first else None
        if exchange.outcome == "finished":
            return meets(targets, ttft, itl, now - exchange.arrived)
        if ttft is None and exchange.request is not None and exchange.request.prepared.streamed:
            ttft = now - exchange.arrived
        return None if meets(targets, ttft, itl, now - exchange.arrived) else False
