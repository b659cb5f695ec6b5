"""What our logger adds to vLLM's, and what it mends."""

from types import SimpleNamespace

from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from synthia_vllm.engine.stat_logger import StatLogger, never_scheduled_waited_only


def test_the_engine_tells_how_much_it_runs_at_once() -> None:
    config = VllmConfig()
    config.model_config = SimpleNamespace(served_model_name="told", max_model_len=128, is_diffusion=False)
    for most in (7, 8):  # a second engine in the same process
        config.scheduler_config.max_num_seqs = most
        config.scheduler_config.max_num_batched_tokens = 100 * most
        StatLogger(config)
        labels = {"model_name": "told", "engine": "0"}
        assert REGISTRY.get_sample_value("synthia_max_num_seqs", labels) == most
        assert REGISTRY.get_sample_value("synthia_max_num_batched_tokens", labels) == 100 * most


def test_a_request_that_was_never_scheduled_only_waited() -> None:
    """By what vLLM itself makes of one that ended in the queue, beside one that ran."""
    stats = IterationStats()
    now = stats.iteration_timestamp
    ended = RequestStateStats(arrival_time=now - 2.0, queued_ts=5_000.0, first_token_ts=5_001.0, last_token_ts=5_001.0)
    ran = RequestStateStats(
        arrival_time=now - 4.0, queued_ts=5_000.0, scheduled_ts=5_001.0, first_token_ts=5_002.0, last_token_ts=5_003.0
    )
    for reason, request in ((FinishReason.ERROR, ended), (FinishReason.STOP, ran)):
        stats.update_from_finished_request(reason, "x", 3, 10, request)
    assert stats.finished_requests[0].queued_time == -5_000.0  # why there is this module

    never_scheduled_waited_only(stats.finished_requests)
    times = [(one.queued_time, one.prefill_time, one.inference_time) for one in stats.finished_requests]
    assert times == [(2.0, 0.0, 0.0), (1.0, 1.0, 2.0)]
