"""The one list of panels: what each dashboard shows, in the order in which it shows it.

`$user` and `$replica` are the dashboards' variables; on one machine the engine's own series have no `replica` label,
which `.*` matches as well. Rates are over `$__rate_interval`, at least four scrapes. Names with colons are recorded by
`deploy/prometheus/rules`.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "bars"]


@dataclass(frozen=True)
class Panel:
    """`queries` are pairs of PromQL and legend; `unit` is one of Grafana's."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str = ""
    kind: Kind = "timeseries"
    width: int = 8  # of 24
    stacked: bool = False
    red_above: float | None = None
    red_below: float | None = None


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]
    variable: str = ""  # a label to choose values of
    variable_series: str = ""


def _quantiles(
    series: str, by: str = "", where: str = "", quantiles: tuple[float, ...] = (0.5, 0.99)
) -> tuple[tuple[str, str], ...]:
    labels = f"le, {by}" if by else "le"
    prefix = f"{{{{{by}}}}} " if by else ""
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate({series}_bucket{where}[$__rate_interval])))",
            f"{prefix}p{q * 100:g}",
        )
        for q in quantiles
    )


def _service(name: str, expr: str, unit: str = "short", **options: float) -> Panel:
    return Panel(name, unit, ((expr, ""),), kind="stat", width=4, **options)  # type: ignore[arg-type]


SERVICE = Dashboard(
    "synthia-service",
    "Synthia: service",
    (
        _service("Replicas up", "sum(replica:synthia_up:max)", red_below=1),
        _service("Generated tokens/s", 'sum(synthia_tokens_per_second{kind="generation"})'),
        _service("Running", "synthia:requests_in_flight:sum"),
        _service("Queued", "synthia:requests_queued:sum"),
        _service("SLO burn rate, 1 h", "synthia:slo_burn:rate1h", red_above=1),
        _service("Bill's rows not written", "sum(synthia_ledger_waiting_rows)", red_above=10_000),
        Panel(
            "Tokens a second",
            "short",
            (("sum by (kind) (synthia_tokens_per_second)", "{{kind}}"),),
            "Over the last 10 seconds, as counted on the way to the clients.",
            width=12,
        ),
        Panel("Requests a second by outcome", "reqps", (("synthia:requests:rate5m", "{{outcome}}"),), width=12),
        Panel(
            "Time to first token",
            "s",
            _quantiles("synthia_time_to_first_token_seconds"),
            "From a request's arrival to its first token on the way to the client, waiting included.",
        ),
        Panel(
            "… of it in the queue", "s", _quantiles("synthia_queue_wait_seconds"), "Of all requests, not only streams."
        ),
        Panel("Between tokens", "s", _quantiles("synthia_inter_token_latency_seconds")),
        Panel("Whole requests", "s", _quantiles("synthia_request_duration_seconds")),
        Panel(
            "Running and queued",
            "short",
            (("synthia:requests_in_flight:sum", "running"), ("synthia:requests_queued:sum", "queued")),
        ),
        Panel("Refused by reason", "reqps", (("synthia:rejections:rate5m", "{{reason}}"),)),
        Panel(
            "SLO burn rate by window",
            "short",
            (
                ("synthia:slo_burn:rate5m", "5 min"),
                ("synthia:slo_burn:rate30m", "30 min"),
                ("synthia:slo_burn:rate1h", "1 h"),
                ("synthia:slo_burn:rate6h", "6 h"),
            ),
            "At 1 the budget of missed requests is used up just in time; alerts are at 14.4 (1 h) and 6 (6 h).",
            red_above=14.4,
        ),
        Panel(
            "Requests that lost their replica",
            "reqps",
            (
                (
                    "sum by (reason, result) (rate(synthia_stream_resumes_total[$__rate_interval]))",
                    "{{reason}}: {{result}}",
                ),
            ),
        ),
        Panel(
            "Stores",
            "short",
            (
                ("min(synthia_ledger_up)", "database takes the bill"),
                ("min(synthia_limits_shared_up)", "limits are shared"),
            ),
            "1 is well.",
        ),
    ),
)

_USER = '{user=~"$user"}'
_ON_REQUEST = "Empty without --metrics.user-histograms: by user, histograms would be nearly all of /metrics."

USERS = Dashboard(
    "synthia-users",
    "Synthia: users",
    (
        Panel(
            "Generated tokens a second",
            "short",
            ((f"sum by (user) (rate(synthia_generation_tokens_total{_USER}[$__rate_interval]))", "{{user}}"),),
            stacked=True,
            width=12,
        ),
        Panel(
            "Prompt tokens a second",
            "short",
            ((f"sum by (user) (rate(synthia_prompt_tokens_total{_USER}[$__rate_interval]))", "{{user}}"),),
            stacked=True,
            width=12,
        ),
        Panel(
            "Share of service",
            "percentunit",
            (
                (
                    f"sum by (user) (rate(synthia_fair_service_total{_USER}[$__rate_interval]))"
                    " / scalar(sum(rate(synthia_fair_service_total[$__rate_interval])))",
                    "{{user}}",
                ),
            ),
            "Cost of prompt and generated tokens over the user's weight: what the fair queue makes equal.",
            stacked=True,
        ),
        Panel("Running", "short", ((f"sum by (user) (synthia_requests_in_flight{_USER})", "{{user}}"),), stacked=True),
        Panel("Queued", "short", ((f"sum by (user) (synthia_requests_queued{_USER})", "{{user}}"),), stacked=True),
        Panel(
            "Time to first token, p99",
            "s",
            _quantiles("synthia_time_to_first_token_seconds", "user", _USER, (0.99,)),
            _ON_REQUEST,
        ),
        Panel("In the queue, p99", "s", _quantiles("synthia_queue_wait_seconds", "user", _USER, (0.99,)), _ON_REQUEST),
        Panel(
            "Between tokens, p99",
            "s",
            _quantiles("synthia_inter_token_latency_seconds", "user", _USER, (0.99,)),
            _ON_REQUEST,
        ),
        Panel(
            "Refused",
            "reqps",
            (
                (
                    f"sum by (user, reason) (rate(synthia_rejections_total{_USER}[$__rate_interval]))",
                    "{{user}}: {{reason}}",
                ),
            ),
        ),
        Panel(
            "Requests a second",
            "reqps",
            ((f"sum by (user) (rate(synthia_requests_total{_USER}[$__rate_interval]))", "{{user}}"),),
        ),
        Panel(
            "SLO met, last hour",
            "percentunit",
            (
                (
                    'sum by (user) (rate(synthia_slo_requests_total{result="met", user=~"$user"}[1h]))'
                    f" / sum by (user) (rate(synthia_slo_requests_total{_USER}[1h]))",
                    "{{user}}",
                ),
            ),
        ),
        Panel(
            "Tokens in 24 hours",
            "short",
            (
                (
                    f"topk(20, sum by (user) (increase(synthia_generation_tokens_total{_USER}[24h])"
                    f" + increase(synthia_prompt_tokens_total{_USER}[24h])))",
                    "{{user}}",
                ),
            ),
            "By the metrics; the bill itself is `synthia-vllm usage`.",
            kind="bars",
            width=24,
        ),
    ),
    variable="user",
    variable_series="synthia_requests_total",
)

_REPLICA = '{replica=~"$replica"}'

REPLICAS = Dashboard(
    "synthia-replicas",
    "Synthia: replicas",
    (
        Panel("Replicas by state", "short", (("max by (state) (synthia_replicas)", "{{state}}"),), width=12),
        Panel(
            "Up",
            "short",
            (('replica:synthia_up:max{replica=~"$replica|local"}', "{{replica}}"),),
            "1 takes requests and tells of itself; 0 for a quarter of an hour after it is gone.",
            width=12,
        ),
        Panel(
            "Generated tokens a second",
            "short",
            (
                (
                    'sum by (replica) (synthia_tokens_per_second{kind="generation", replica=~"$replica|local"})',
                    "{{replica}}",
                ),
            ),
            "On the way to the clients, over the last 10 seconds.",
            stacked=True,
        ),
        Panel(
            "Generated, by the engines' own count",
            "short",
            ((f"sum by (replica) (rate(vllm:generation_tokens_total{_REPLICA}[$__rate_interval]))", "{{replica}}"),),
            stacked=True,
        ),
        Panel(
            "Prompts, by the engines' own count",
            "short",
            ((f"sum by (replica) (rate(vllm:prompt_tokens_total{_REPLICA}[$__rate_interval]))", "{{replica}}"),),
            stacked=True,
        ),
        Panel("Running", "short", ((f"max by (replica) (vllm:num_requests_running{_REPLICA})", "{{replica}}"),)),
        Panel("Waiting", "short", ((f"max by (replica) (vllm:num_requests_waiting{_REPLICA})", "{{replica}}"),)),
        Panel(
            "KV cache used",
            "percentunit",
            ((f"max by (replica) (vllm:kv_cache_usage_perc{_REPLICA})", "{{replica}}"),),
            red_above=0.95,
        ),
        Panel("Time to first token", "s", _quantiles("vllm:time_to_first_token_seconds", "replica", _REPLICA)),
        Panel("… of it in the engine's queue", "s", _quantiles("vllm:request_queue_time_seconds", "replica", _REPLICA)),
        Panel("Between tokens", "s", _quantiles("vllm:inter_token_latency_seconds", "replica", _REPLICA)),
        Panel(
            "Preemptions a second",
            "ops",
            ((f"sum by (replica) (rate(vllm:num_preemptions_total{_REPLICA}[$__rate_interval]))", "{{replica}}"),),
        ),
        Panel(
            "Prompt tokens found in the prefix cache",
            "percentunit",
            (
                (
                    f"sum by (replica) (rate(vllm:prefix_cache_hits_total{_REPLICA}[$__rate_interval]))"
                    f" / sum by (replica) (rate(vllm:prefix_cache_queries_total{_REPLICA}[$__rate_interval]))",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Whole requests, p99",
            "s",
            _quantiles("vllm:e2e_request_latency_seconds", "replica", _REPLICA, (0.99,)),
        ),
    ),
    variable="replica",
    variable_series="synthia_replica_up",
)

DASHBOARDS = (SERVICE, USERS, REPLICAS)
