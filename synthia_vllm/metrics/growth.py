"""How much counters that engines tell have grown."""

from collections.abc import Mapping

from synthia_vllm.metrics.local import PREEMPTIONS, PREFIX_HITS, PREFIX_QUERIES

# By the name that the live view has for them. Prefix cache: tokens looked up, and found.
COUNTERS = {
    "prefix_cache_queries": PREFIX_QUERIES,
    "prefix_cache_hits": PREFIX_HITS,
    "preemptions": PREEMPTIONS,
}
Totals = Mapping[str, float | None]  # by name, None where the engine does not tell


class Growth:
    """The sum over all engines of what each has counted since the last look.

    What an engine had counted when it was first seen is not of now: it makes no growth.
    """

    def __init__(self) -> None:
        self._before: Mapping[str, Totals] = {}

    def since(self, totals: Mapping[str, Totals]) -> dict[str, float | None]:
        """`totals` are by engine. None where no engine tells."""
        found: dict[str, float | None] = {}
        for name in COUNTERS:
            pairs = [(self._before.get(engine, now).get(name), now.get(name)) for engine, now in totals.items()]
            grown = [max(0.0, after - before) for before, after in pairs if before is not None and after is not None]
            found[name] = sum(grown) if grown else None
        self._before = totals
        return found
