"""Histograms of durations whose sum is negative, as vLLM's can be, are shown without their sum.

vLLM 0.29 takes a request that ended before it was scheduled (a grammar that doesn't compile) as scheduled at zero on
the machine's clock: its queue time is about minus the machine's uptime. `engine.stat_logger` prevents it in engines
that are started here. Of others only the page is seen, and what the sum should be can't be known from it.
"""

from collections.abc import Mapping

from synthia_vllm.metrics.exposition import Block


def without_negative_sums(blocks: Mapping[str, Block]) -> None:
    """Leaves out `_sum` and `_count` of such histograms, in place. Their buckets stay, and tell the count.

    Both, since OpenMetrics has none without the other.
    """
    for block in blocks.values():
        if block.kind != "histogram":
            continue
        start = f"{block.name}_sum"
        negative = [key for key, value in block.samples.items() if value[:1] == "-" and key.startswith(start)]
        for key in negative:
            del block.samples[key]
            block.samples.pop(f"{block.name}_count{key[len(start) :]}", None)
