"""The engine in this process, as it tells in prometheus_client's registry."""

from collections import defaultdict

from prometheus_client import CollectorRegistry

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USE = "vllm:kv_cache_usage_perc"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"


class LocalEngine:
    """Some of vLLM's series, without putting the whole page together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        names = [RUNNING, WAITING, KV_USE, PREFIX_QUERIES, PREFIX_HITS, PREEMPTIONS]
        self._registry = registry.restricted_registry(names)

    def values(self) -> dict[str, float]:
        """By name, summed over the engines of this process."""
        found: dict[str, float] = defaultdict(float)
        for family in self._registry.collect():
            for sample in family.samples:
                found[sample.name] += sample.value
        return dict(found)
