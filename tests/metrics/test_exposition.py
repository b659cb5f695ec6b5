from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from synthia_vllm.metrics.cells import Counts, Histograms
from synthia_vllm.metrics.exposition import Exposition, read_page, sample_lines, with_label
from synthia_vllm.metrics.series import Family

HOSTILE = 'a "quoted" } back\\slash\nline {x="y"} 1.5'
FAMILY = Family("our_requests_total", "counter", ("user",), "Requests.")
TIMES = Family("our_seconds", "histogram", ("user",), "Times.", (0.1, 1.0))


def page() -> str:
    """What prometheus_client writes, which is what vLLM sends."""
    registry = CollectorRegistry()
    counter = Counter("their_tokens", "Tokens, \\ and\nlines.", ["model_name"], registry=registry)
    counter.labels(HOSTILE).inc(3)
    counter.labels("b").inc(1e21)
    Gauge("their_running", "Running.", registry=registry).set(float("nan"))
    histogram = Histogram("their_seconds", "Times.", ["engine"], registry=registry, buckets=(0.1, 1))
    histogram.labels("0").observe(0.5)
    return generate_latest(registry).decode()


def samples(families: Any) -> dict[tuple[str, frozenset[Any]], str]:
    return {
        (sample.name, frozenset(sample.labels.items())): str(float(sample.value))
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_page_is_read_as_prometheus_client_reads_it() -> None:
    blocks = read_page(page())
    assert {name: block.kind for name, block in blocks.items()} == {
        "their_tokens_total": "counter",
        "their_running": "gauge",
        "their_seconds": "histogram",
    }
    text = "".join(sample_lines(block.samples) for block in blocks.values())
    assert samples(parse_text(text)) == samples(parse_text(page()))


def test_a_label_is_put_in_front() -> None:
    assert with_label("a", 'replica="r"') == 'a{replica="r"}'
    assert with_label('a{b="c"}', 'replica="r"') == 'a{replica="r",b="c"}'
    text = "".join(sample_lines(block.samples, 'replica="r"') for block in read_page(page()).values())
    found = samples(parse_text(text))
    expected = samples(parse_text(page()))
    assert found == {(name, labels | {("replica", "r")}): value for (name, labels), value in expected.items()}


def test_a_label_that_was_there_is_kept_as_prometheus_keeps_it() -> None:
    assert with_label('a{replica="x",b="c"}', 'replica="r"') == 'a{replica="r",exported_replica="x",b="c"}'
    assert with_label('a{b="c",replica="x"}', 'replica="r"') == 'a{replica="r",b="c",exported_replica="x"}'


async def together(openmetrics: bool) -> str:
    exposition = Exposition(openmetrics)
    requests, times = Counts(FAMILY), Histograms(TIMES)
    requests.cell(HOSTILE).value = 2
    times.cell("alice").observe(0.5, request_id="req-1")
    times.cell("alice").observe(7.0)
    await exposition.add_table(requests)
    await exposition.add_table(times)
    for name in ("one", "two"):
        blocks = read_page(page(), ("their_",))
        await exposition.add_blocks(
            (block, sample_lines(block.samples, f'replica="{name}"')) for block in blocks.values()
        )
    return (await exposition.bytes()).decode()


@pytest.mark.parametrize(("openmetrics", "parse"), [(False, parse_text), (True, parse_openmetrics)])
async def test_pages_become_one_with_each_family_told_once(openmetrics: bool, parse: Any) -> None:
    text = await together(openmetrics)
    families = list(parse(text))
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) == len(families)
    found = samples(families)
    assert found["our_requests_total", frozenset({("user", HOSTILE)})] == "2.0"
    assert found["our_seconds_count", frozenset({("user", "alice")})] == "2.0"
    assert found["our_seconds_bucket", frozenset({("user", "alice"), ("le", "1.0")})] == "1.0"
    both = [labels for name, labels in found if name == "their_seconds_sum"]
    assert both == [frozenset({("engine", "0"), ("replica", name)}) for name in ("one", "two")]


async def test_exemplars_name_the_request_in_openmetrics_only() -> None:
    exemplars = [
        (sample.labels["le"], sample.exemplar.labels, sample.exemplar.value)
        for family in parse_openmetrics(await together(True))
        for sample in family.samples
        if sample.exemplar
    ]
    assert exemplars == [("1.0", {"request_id": "req-1"}, 0.5)]
    assert "req-1" not in await together(False)


@pytest.mark.parametrize("openmetrics", [False, True])
async def test_of_two_kinds_under_one_name_the_first_stands(openmetrics: bool) -> None:
    exposition = Exposition(openmetrics)
    for kind, value in (("gauge", 1), ("histogram", 2), ("gauge", 3)):
        blocks = read_page(f"# HELP their_x X.\n# TYPE their_x {kind}\ntheir_x {value}\n")
        await exposition.add_blocks((block, sample_lines(block.samples, f'r="{value}"')) for block in blocks.values())
    text = (await exposition.bytes()).decode()
    assert text.count("# TYPE") == 1
    assert [line for line in text.splitlines() if not line.startswith("#")] == ['their_x{r="1"} 1', 'their_x{r="3"} 3']
