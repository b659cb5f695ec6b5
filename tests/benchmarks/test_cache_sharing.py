"""What the benchmark of the prefix cache makes of its times."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cache_sharing import MODES, PROMPT_TOKENS, markdown, summary, system_prompt, verdict
from synthia_vllm.bench.null.tokenizer import null_tokenizer

ROOT = Path(__file__).parents[2]
NONE_CACHED = {"other": [0.0] * 20}


def times(*, other: float, noise: float = 0.05) -> dict[str, list[float]]:
    draws = random.Random(1)
    means = {"first": 2.0, "same": 0.1, "group": 0.1, "other": other, "fresh": 2.0}
    return {who: [draws.gauss(mean, noise * mean) for _ in range(20)] for who, mean in means.items()}


def test_a_cache_that_is_shared_is_told() -> None:
    found = summary(times(other=0.1), {"other": [1984.0] * 20})
    assert found["measurable"]
    assert found["guessed right"] == 1
    assert found["other - fresh, ms"] == pytest.approx(-1900, abs=100)
    assert "a measurable difference" in verdict("all", found)
    assert "1984 tokens of theirs found" in verdict("all", found)


def test_one_that_is_not_shared_tells_nothing() -> None:
    found = summary(times(other=2.0), NONE_CACHED)
    assert not found["measurable"]
    assert found["guessed right"] < 0.75
    assert "no measurable difference" in verdict("user", found)


def test_a_small_difference_is_told_where_it_is_always_there() -> None:
    assert summary(times(other=1.9, noise=0.005), NONE_CACHED)["measurable"]


def test_no_two_prompts_begin_alike() -> None:
    tokenizer = null_tokenizer()
    one, other = (system_prompt(tokenizer) for _ in range(2))
    assert one[:16] != other[:16]
    assert len(tokenizer.encode(one)) == pytest.approx(PROMPT_TOKENS, rel=0.01)


def test_the_lines_quoted_tell_of_every_mode() -> None:
    report: dict[str, Any] = {"summary": {mode: summary(times(other=2.0), NONE_CACHED) for mode in MODES}}
    assert [line.split(":")[0] for line in markdown(report).splitlines()[::2]] == [f"- `{mode}`" for mode in MODES]


def test_the_figures_quoted_are_the_ones_measured() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "cache_sharing.json").read_text())
    assert markdown(report) in (ROOT / "docs" / "security.md").read_text()
    assert not report["summary"]["user"]["measurable"]
