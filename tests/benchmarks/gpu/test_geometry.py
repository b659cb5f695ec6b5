import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.geometry import SYNTHIA, TINY, make_model, tensors
from synthia_vllm.bench.roofline import needs


def test_synthias_weights_are_those_of_the_card() -> None:
    sizes = [math.prod(shape) for part in tensors(SYNTHIA) for shape in part.values()]
    assert 2 * sum(sizes) == pytest.approx(21.5e9, rel=0.005)
    assert needs(SYNTHIA).kv_bytes_per_token == 192 * 1024


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(TINY, tmp_path_factory.mktemp("model"))


def test_a_made_model_loads_and_generates_in_transformers(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.tensor([[1, 1000, 2000]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
    assert len(AutoTokenizer.from_pretrained(tiny)) == TINY["vocab_size"]


def test_a_model_that_is_there_is_kept_and_one_half_made_is_made_again(tiny: Path) -> None:
    index = tiny / "model.safetensors.index.json"
    before = index.stat().st_mtime_ns
    make_model(TINY, tiny)
    assert index.stat().st_mtime_ns == before
    index.unlink()
    make_model(TINY, tiny)
    assert index.exists()


def test_another_geometry_replaces_it(tmp_path: Path) -> None:
    make_model(TINY, tmp_path)
    make_model({**TINY, "num_hidden_layers": 1}, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
    weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("layers.1." in name for name in weights)
