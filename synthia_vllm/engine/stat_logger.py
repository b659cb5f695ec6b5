"""vLLM's Prometheus metrics, mended and with two more; for `vllm.stat_logger_plugins`.

- Without times of requests that the engine never ran. Read in vLLM 0.29.0: a request that ends before it was scheduled
  (a grammar that doesn't compile) is taken as scheduled at zero on the machine's clock (`v1/metrics/stats.py`,
  update_from_finished_request). About minus the machine's uptime is added to the sum of queue times, and as much to
  those of prefill and inference.
- With `max_num_seqs` and `max_num_batched_tokens`, which vLLM tells nobody: beyond the first requests wait in vLLM's
  own queue, and the second bounds a step, so that who gives it requests and watches its progress has to know.
"""

from typing import Any

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import PrometheusStatLogger

MAX_NUM_SEQS = Gauge(
    "synthia_max_num_seqs",
    "Most requests that the engine runs at once.",
    ("model_name", "engine"),  # as vLLM's own
    multiprocess_mode="mostrecent",
)

MAX_NUM_BATCHED_TOKENS = Gauge(
    "synthia_max_num_batched_tokens",
    "Most tokens that one step of the engine computes.",
    ("model_name", "engine"),
    multiprocess_mode="mostrecent",
)


class StatLogger(PrometheusStatLogger):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, *given: Any, **named: Any) -> None:
        super().__init__(vllm_config, *given, **named)
        for labels in self.per_engine_labelvalues.values():
            MAX_NUM_SEQS.labels(*labels).set(vllm_config.scheduler_config.max_num_seqs)
            MAX_NUM_BATCHED_TOKENS.labels(*labels).set(vllm_config.scheduler_config.max_num_batched_tokens)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *given: Any, **named: Any) -> None:
        if iteration_stats is not None and iteration_stats.finished_requests:
            never_scheduled_waited_only(iteration_stats.finished_requests)
        super().record(scheduler_stats, iteration_stats, *given, **named)


def never_scheduled_waited_only(finished: list[Any]) -> None:
    """Counts the whole life of such requests as time in the queue, in place."""
    for request in finished:
        if request.queued_time < 0:
            request.queued_time = request.e2e_latency
            request.prefill_time = request.inference_time = 0.0
