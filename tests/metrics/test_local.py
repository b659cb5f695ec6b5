from prometheus_client import CollectorRegistry, Counter, Gauge

from synthia_vllm.metrics.local import KV_USE, PREFIX_HITS, RUNNING, LocalEngine


def test_what_vllm_tells_in_this_process_is_found_by_its_exported_names() -> None:
    registry = CollectorRegistry()
    running = Gauge("vllm:num_requests_running", "As vLLM names it.", ["engine"], registry=registry)
    hits = Counter("vllm:prefix_cache_hits", "As vLLM names it.", ["engine"], registry=registry)
    Counter("vllm:request_success", "Not asked for.", registry=registry).inc()
    for engine in ("0", "1"):
        running.labels(engine).set(2)
        hits.labels(engine).inc(50)
    values = LocalEngine(registry).values()
    assert values == {RUNNING: 4, PREFIX_HITS: 100}
    assert values.get(KV_USE) is None
