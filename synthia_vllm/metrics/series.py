"""Every series of the gateway, in the order of the docs: name, kind, labels, help text, buckets.

What is counted is what the client gets, taken at the gateway's last step before the socket. Times are in seconds.
`user` names the first users since the start, as many as the setting `metrics.max_users` says; all others are `other`.
Histograms have that label only with the setting `metrics.user_histograms`: they would be nearly all of the page.
`model` is a name that the engine has answered to, else `other`. `replica` is `local` where the engine is in this
process. Series that live elsewhere: `synthia_stream_resumes_total` in `replicas`, `synthia_limits_*` in `limits`,
`synthia_replies_taken_up_total` in `gateway.journal.store`,
`synthia_background_restarts_total` in `supervise`; vLLM's own `vllm:*` come from the engines.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

OTHER = "other"  # all that has no label value of its own
LOCAL = "local"  # the replica in this process

# From a GPU that answers at once to a CPU behind a queue.
_WAITS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60, 120)
_GAPS = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 1, 2, 5),
)
_DURATIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 240, 600, 1200)


@dataclass(frozen=True)
class Family:
    """One series' description. `name` is as it is exported, with `_total` for a counter."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()  # upper bounds, without +Inf


REQUESTS = Family(
    "synthia_requests_total",
    "counter",
    ("user", "model", "route", "outcome"),
    "Requests by what came of them: finished, cancelled (the client left), rejected (4xx, 503), failed, stopped.",
)
PROMPT_TOKENS = Family(
    "synthia_prompt_tokens_total", "counter", ("user", "model"), "Prompt tokens, by the engine's own count."
)
GENERATION_TOKENS = Family(
    "synthia_generation_tokens_total", "counter", ("user", "model"), "Generated tokens, by the engine's own count."
)
TIME_TO_FIRST_TOKEN = Family(
    "synthia_time_to_first_token_seconds",
    "histogram",
    ("model",),
    "From a request's arrival to its first token on the way to the client, waiting included. Streams only.",
    _WAITS,
)
INTER_TOKEN_LATENCY = Family(
    "synthia_inter_token_latency_seconds",
    "histogram",
    ("model",),
    "Gap between two chunks of a stream, one a chunk however many tokens it has, as `vllm bench serve` counts.",
    _GAPS,
)
REQUEST_DURATION = Family(
    "synthia_request_duration_seconds",
    "histogram",
    ("model",),
    "From a request's arrival to the end of its reply; whole replies only.",
    _DURATIONS,
)
QUEUE_WAIT = Family(
    "synthia_queue_wait_seconds",
    "histogram",
    ("model",),
    "From a request's arrival to its hand-over to the engine.",
    _WAITS,
)
TOKENS_PER_SECOND = Family(
    "synthia_tokens_per_second",
    "gauge",
    ("model", "replica", "kind"),
    "Tokens a second over the last 10 s; kind is prompt or generation. The sum over replicas is the service's.",
)
REQUESTS_IN_FLIGHT = Family("synthia_requests_in_flight", "gauge", ("user",), "Requests in the engine.")
REQUESTS_QUEUED = Family("synthia_requests_queued", "gauge", ("user",), "Requests that wait for their turn.")
FAIR_SERVICE = Family(
    "synthia_fair_service_total",
    "counter",
    ("user",),
    "Service had: cost of prompt and generated tokens over the user's weight (Virtual Token Counter).",
)
REJECTIONS = Family(
    "synthia_rejections_total",
    "counter",
    ("user", "reason"),
    "Requests refused: a limit's name, overloaded, queue_timeout, bad_request, unauthorized, …; engine: it refused.",
)
SLO_REQUESTS = Family(
    "synthia_slo_requests_total",
    "counter",
    ("user", "result"),
    "Requests that met or missed the targets of their priority class (setting `slo`).",
)
SLO_OBJECTIVE = Family(
    "synthia_slo_objective", "gauge", (), "Share of requests that is to meet its targets (setting `slo.objective`)."
)
GATEWAYS = Family(
    "synthia_gateways",
    "gauge",
    (),
    "Living gateways before the same engines whose counts the page adds up (limits.redis); 1 while Redis is gone.",
)
EVENT_LOOP_BUSY = Family(
    "synthia_event_loop_busy_ratio",
    "gauge",
    (),
    "Share of the last minute in which the gateway's event loop computed; of several gateways the busiest.",
)
REPLICAS = Family("synthia_replicas", "gauge", ("state",), "Replicas by state: up, unproven, draining, out.")
REPLICA_UP = Family(
    "synthia_replica_up",
    "gauge",
    ("replica",),
    "1 while a replica takes requests and its metrics are fresh; 0: its counters stand still, its gauges are gone.",
)
LEDGER_UP = Family("synthia_ledger_up", "gauge", (), "0 while the database does not take the bill's rows.")
LEDGER_WAITING = Family("synthia_ledger_waiting_rows", "gauge", (), "Rows of the bill that are not written yet.")
LEDGER_LOST = Family(
    "synthia_ledger_lost_rows_total", "counter", (), "Rows of the bill given up: the database was gone for too long."
)
