"""What a client gets, and when: measured on the last step before the socket, for the exporter.

A chunk's gap is counted as `vllm bench serve` (0.29) counts it: from the chunk before, one observation a chunk however
many tokens it brings; chunks that go out together have a gap and zeros. Unlike there, a chunk without tokens (the role
at a chat's start, the usage at its end) is none. All of it costs well under 3 µs a chunk (benchmarks/exporter.py).
"""

from bisect import bisect_left

from synthia_vllm.gateway.call import Call
from synthia_vllm.metrics.cells import Count, Histogram
from synthia_vllm.metrics.rates import Tokens
from synthia_vllm.metrics.recorder import Recorder
from synthia_vllm.metrics.series import LOCAL
from synthia_vllm.metrics.slo import meets

_UNCOUNTED = ("/health", "/ready", "/metrics", "/sd")  # asked by machines, all the time


class Metering:
    """Prices and targets that hold for all deliveries, and where they are counted."""

    def __init__(self, recorder: Recorder, *, prompt_cost: float = 1.0, generated_cost: float = 2.0) -> None:
        self.recorder = recorder
        self.prompt_cost = prompt_cost
        self.generated_cost = generated_cost

    def open(self, call: Call) -> None:
        call.delivery = Delivery(self, call)

    def close(self, call: Call) -> None:
        """Counts what is known at the end only. To be called once, for every call."""
        if call.delivery is not None and call.route not in _UNCOUNTED:
            call.delivery.end()


class Delivery:
    """One reply on its way out."""

    __slots__ = (
        "_bound",
        "_call",
        "_clock",
        "_cost",
        "_first",
        "_gap_bounds",
        "_gap_counts",
        "_gaps",
        "_generated",
        "_generation",
        "_last",
        "_longest",
        "_metering",
        "_model",
        "_prompt",
        "_replica",
        "_service",
        "_tokens",
        "_user",
        "_waited",
    )

    _gaps: Histogram
    _gap_counts: list[int]
    _gap_bounds: tuple[float, ...]
    _generation: Count
    _service: Count
    _tokens: Tokens

    def __init__(self, metering: Metering, call: Call) -> None:
        self._metering = metering
        self._call = call
        self._clock = metering.recorder.clock
        self._user = ""  # label; empty until it is known
        self._model = ""
        self._replica = ""
        self._cost = 0.0  # of a generated token, over the user's weight
        self._generated = 0  # tokens counted
        self._prompt = 0
        self._first = 0.0
        self._last = 0.0
        self._longest = 0.0
        self._waited = False
        self._bound = False

    def sent(self, body: bytes) -> None:
        """Told of each part of a stream when it has gone out. Nothing in here may wait or be slow."""
        call = self._call
        new = call.generated - self._generated
        if new <= 0:
            return
        now = self._clock()
        if self._first:
            gap = now - self._last
            self._gap_counts[bisect_left(self._gap_bounds, gap)] += 1
            self._gaps.sum += gap
            if gap > self._longest:  # noqa: PLR1730  (max() takes three times as long)
                self._longest = gap
        else:
            self._begin(now)
        self._last = now
        if new > 1:
            self._gap_counts[0] += max(0, min(new, body.count(b"\n\n")) - 1)
        self._add_generated(new)

    def end(self) -> None:
        call, recorder = self._call, self._metering.recorder
        self._name()
        if call.billed and call.max_generated:
            self._bind()
            self._add_prompt(call.billed_prompt - self._prompt)
            if call.billed_generated > self._generated:
                self._add_generated(call.billed_generated - self._generated)
        route = "/admin" if call.route.startswith("/admin/") else call.route
        recorder.requests.cell(self._user, self._model, route, call.outcome).value += 1
        if call.outcome == "rejected":
            recorder.rejections.cell(self._user, call.reason or "engine").value += 1
        if not call.max_generated:
            return
        if call.dispatched is not None and call.status < 400:
            self._observe_wait()
            if call.outcome == "finished":
                duration = recorder.duration.cell(self._model, self._user)
                duration.observe((call.ended or self._clock()) - call.arrived, call.request_id)
        if self._longest:
            self._gaps.exemplify(self._longest, call.request_id)
        met = self._met()
        if met is not None:
            recorder.judge(self._user, met)

    def _begin(self, now: float) -> None:
        """The first token is out."""
        call = self._call
        self._name()
        self._bind()
        self._first = now
        recorder = self._metering.recorder
        recorder.first_token.cell(self._model, self._user).observe(now - call.arrived, call.request_id)
        recorder.engine_first_token.observe(now - (call.dispatched or call.arrived))
        self._gaps = recorder.gaps.cell(self._model, self._user)
        self._gap_counts, self._gap_bounds = self._gaps.counts, self._gaps.bounds
        self._observe_wait()
        if call.prompt_counted:
            self._add_prompt(call.prompt_tokens)

    def _name(self) -> None:
        """The labels, when it is known who asked what and whether the engine knew it."""
        if not self._user:
            call, recorder = self._call, self._metering.recorder
            self._user = recorder.user(call.account.user)
            self._model = recorder.model(call.model, answered=call.billed and call.status > 0)

    def _bind(self) -> None:
        if self._bound:
            return
        self._bound = True
        call, metering = self._call, self._metering
        recorder = metering.recorder
        self._cost = metering.generated_cost / call.account.weight
        self._generation = recorder.generation_tokens.cell(self._user, self._model)
        self._service = recorder.service.cell(self._user)
        self._tokens = recorder.rates.tokens(self._model, call.replica or LOCAL)
        self._replica = call.replica

    def _add_generated(self, tokens: int) -> None:
        if self._call.replica is not self._replica:  # it went on elsewhere
            self._replica = self._call.replica
            self._tokens = self._metering.recorder.rates.tokens(self._model, self._replica or LOCAL)
        self._generated += tokens
        self._generation.value += tokens
        self._service.value += tokens * self._cost
        self._tokens.generation += tokens

    def _add_prompt(self, tokens: int) -> None:
        if tokens <= 0:
            return
        metering = self._metering
        self._prompt += tokens
        metering.recorder.prompt_tokens.cell(self._user, self._model).value += tokens
        self._service.value += tokens * metering.prompt_cost / self._call.account.weight
        self._tokens.prompt += tokens

    def _observe_wait(self) -> None:
        call = self._call
        if not self._waited:
            self._waited = True
            cell = self._metering.recorder.queue_wait.cell(self._model, self._user)
            cell.observe(call.queue_wait, call.request_id)

    def _met(self) -> bool | None:
        """Whether its targets were met; None where that is not the service's doing.

        Missed: what broke, what we refused for want of room (503), and what was late when its client left. Not judged:
        a client's own mistakes and limits, and one that left while all was well.
        """
        call = self._call
        if call.outcome in ("failed", "stopped") or call.status >= 500:
            return False
        if call.status >= 400:
            return None
        slo = self._metering.recorder.slo
        targets = slo.batch if call.account.priority == "batch" else slo.interactive
        now = call.ended or self._clock()
        more = self._generated - 1
        itl = (self._last - self._first) / more if self._first and more > 0 else None
        ttft = self._first - call.arrived if self._first else None
        if call.outcome == "finished":
            return meets(targets, ttft, itl, now - call.arrived)
        if ttft is None and call.request is not None and call.request.get("stream") is True:
            ttft = now - call.arrived
        return None if meets(targets, ttft, itl, now - call.arrived) else False
