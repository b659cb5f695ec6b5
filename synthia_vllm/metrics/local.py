"""The engine in this process, as it tells in prometheus_client's registry."""

import os
from collections import defaultdict

from prometheus_client import REGISTRY, CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.multiprocess import MultiProcessCollector

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USE = "vllm:kv_cache_usage_perc"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"


_SEVERAL = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own


def of_all_processes(registry: CollectorRegistry) -> CollectorRegistry:
    """What all processes that serve one engine told, where they are several; else what is given.

    vLLM counts a request where it is served, and tells the state of its engine to any one of them.
    """
    if registry is not REGISTRY or _SEVERAL not in os.environ:
        return registry
    found = CollectorRegistry()
    MultiProcessCollector(found)  # type: ignore[no-untyped-call]
    for process in (ProcessCollector, PlatformCollector, GCCollector):
        process(registry=found)
    return found


class LocalEngine:
    """Some of vLLM's series, without putting the whole page together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._names = frozenset((RUNNING, WAITING, KV_USE, PREFIX_QUERIES, PREFIX_HITS, PREEMPTIONS))
        found = of_all_processes(registry)
        self._registry = registry.restricted_registry(self._names) if found is registry else found

    def values(self) -> dict[str, float]:
        """By name, summed over the engines of this process."""
        found: dict[str, float] = defaultdict(float)
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name in self._names:
                    found[sample.name] += sample.value
        return dict(found)
