import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks.serving import markdown
from synthia_vllm.cli.doctor import TCMALLOC_COST

ROOT = Path(__file__).parents[1]
NAMES = sorted(set(re.findall(r"`(synthia_vllm(?:\.\w+)+)`", (ROOT / "docs" / "architecture.md").read_text())))


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_page_names_what_exists(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


def test_the_figures_quoted_are_the_ones_measured() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text())
    assert markdown(report) in (ROOT / "README.md").read_text()
    without = report["ratios"]["completions, 64 streams: tokens/s, untuned / tuned"]["median"]
    assert f"{100 * (1 - without):.0f} %" in TCMALLOC_COST
