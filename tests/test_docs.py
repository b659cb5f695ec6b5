import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(set(re.findall(r"`(synthia_vllm(?:\.\w+)+)`", (ROOT / "docs" / "architecture.md").read_text())))


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_page_names_what_exists(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)
