import random
import statistics

import pytest

from synthia_vllm.metrics.sketch import Sketch, quantiles


@pytest.mark.parametrize("typical", [0.0002, 0.03, 0.116, 7.0, 900.0])
def test_a_percentile_is_right_to_a_percent(typical: float) -> None:
    seed = random.Random(1)
    sketch, values = Sketch(), [typical * seed.lognormvariate(0, 0.5) for _ in range(10_001)]
    for value in values:
        sketch.observe(value)
    own = statistics.quantiles(values, n=100, method="inclusive")
    assert quantiles(sketch.counts, 0.5, 0.9, 0.99) == pytest.approx([own[49], own[89], own[98]], rel=0.015)


def test_one_observation_is_all_its_percentiles() -> None:
    sketch = Sketch()
    sketch.observe(0.116)
    assert quantiles(sketch.counts, 0.01, 0.5, 1.0) == pytest.approx([0.116] * 3, rel=0.01)


def test_whoever_holds_its_counts_adds_to_it() -> None:
    sketch = Sketch()
    held = sketch.counts
    assert quantiles(held, 0.5, 0.99) == [None, None]
    sketch.observe(5.0)
    assert quantiles(held, 0.5) == pytest.approx([5.0], rel=0.01)


def test_what_is_too_small_or_too_great_has_an_end() -> None:
    sketch = Sketch()
    for value in (0.0, 0.0, 1e9):
        sketch.observe(value)
    least, most = quantiles(sketch.counts, 0.5, 1.0)
    assert least == 0.0
    assert most == pytest.approx(1e4, rel=0.02)
