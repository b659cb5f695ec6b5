import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos, cluster, cost, eval_agreement, eval_speed, exporter, fairness, serving
from benchmarks.load import quoted
from benchmarks.load.run_file import read
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


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("benchmark", [serving, cost, fairness, cluster, chaos, exporter, eval_agreement, eval_speed])
def test_the_figures_quoted_are_the_ones_measured(benchmark: Any) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    assert benchmark.markdown(results(name)) in (ROOT / "README.md").read_text()


def test_the_comparison_quoted_is_the_one_measured() -> None:
    run = read(ROOT / "benchmarks" / "results" / "full.json.gz")
    assert quoted.markdown(run) in (ROOT / "README.md").read_text()


def test_doctor_quotes_what_was_measured() -> None:
    report = results("serving")
    without = report["ratios"]["completions, 64 streams: tokens/s, untuned / tuned"]["median"]
    assert f"{100 * (1 - without):.0f} %" in TCMALLOC_COST
