"""The engine in this process, as it tells in prometheus_client's registry."""

from prometheus_client import CollectorRegistry

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USE = "vllm:kv_cache_usage_perc"


class LocalEngine:
    """vLLM's gauges, without putting the whole page together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry.restricted_registry([RUNNING, WAITING, KV_USE])

    def values(self) -> dict[str, float]:
        """By name, summed over the engines of this process."""
        found: dict[str, float] = {}
        for family in self._registry.collect():
            found[family.name] = sum(sample.value for sample in family.samples)
        return found
