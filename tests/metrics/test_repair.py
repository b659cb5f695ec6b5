"""Negative sums of histograms don't reach our page."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from synthia_vllm.metrics.exposition import Exposition, read_page, sample_lines
from synthia_vllm.metrics.repair import without_negative_sums


async def test_only_the_negative_sum_goes_and_the_page_stays_valid() -> None:
    registry = CollectorRegistry()
    queue = Histogram("vllm:queue_seconds", "Queue.", ["engine"], registry=registry, buckets=[1, 2])
    queue.labels("0").observe(1.5)
    queue.labels("0").observe(-6055.0)
    queue.labels("1").observe(1.5)
    Histogram("vllm:plain_seconds", "Without labels.", registry=registry, buckets=[1]).observe(-1.0)
    Gauge("vllm:balance", "May be negative.", registry=registry).set(-3)
    Counter("vllm:sum_total", "A counter.", registry=registry).inc(2)
    blocks = read_page(generate_latest(registry).decode())
    without_negative_sums(blocks)

    page = Exposition(openmetrics=True)
    await page.add_blocks([(block, sample_lines(block.samples)) for block in blocks.values()])
    samples = {
        (sample.name, sample.labels.get("engine"), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families((await page.bytes()).decode())
        for sample in family.samples
    }
    assert ("vllm:queue_seconds_sum", "0", None) not in samples
    assert ("vllm:queue_seconds_count", "0", None) not in samples
    assert samples["vllm:queue_seconds_bucket", "0", "+Inf"] == 2
    assert samples["vllm:queue_seconds_sum", "1", None] == 1.5
    assert samples["vllm:queue_seconds_count", "1", None] == 1
    assert ("vllm:plain_seconds_sum", None, None) not in samples
    assert samples["vllm:balance", None, None] == -3
    assert samples["vllm:sum_total", None, None] == 2
