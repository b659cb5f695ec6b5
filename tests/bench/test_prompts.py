"""Lengths as they are given and drawn."""

import random
import statistics

import pytest

from synthia_vllm.bench.prompts import Lengths, Normal, Span, lengths


@pytest.mark.parametrize(
    ("text", "wanted"), [("512", Span(512, 512)), ("128-512", Span(128, 512)), ("512:128", Normal(512, 128))]
)
def test_lengths_are_one_number_a_span_or_mean_and_deviation(text: str, wanted: Lengths) -> None:
    assert lengths(text) == wanted
    assert str(wanted) == text


@pytest.mark.parametrize("text", ["", "0", "0:3", "-3", "9-3", "512:", "5.5", "a:b", "1-2-3"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"wanted"):
        lengths(text)


@pytest.mark.parametrize("deviation", [0, 32, 128, 512])
def test_a_normal_length_has_its_mean_and_is_no_less_than_one(deviation: int) -> None:
    source = random.Random(1)
    drawn = [Normal(512, deviation).draw(source) for _ in range(4000)]
    assert min(drawn) >= 1
    assert statistics.mean(drawn) == pytest.approx(512, rel=0.05)
    if deviation <= 128:
        assert statistics.stdev([*drawn, 512]) == pytest.approx(deviation, rel=0.1, abs=0.01)
