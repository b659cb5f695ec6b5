import json
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.engine.memory import Geometry, check_gpu_memory, choose_kv_bytes, read_geometry
from synthia_vllm.errors import SetupError

SYNTHIA = Geometry(context=4096, heads=32, kv_bytes_per_token=192 * 1024, weight_bytes=int(21.5e9))


def machine(memory_gib: float, gpu_gib: float = 0) -> Machine:
    gpus = (Gpu("GPU", int(gpu_gib * GIB), int(gpu_gib * GIB)),) if gpu_gib else ()
    return Machine(cpus=2, memory_total=int(memory_gib * GIB), memory_available=int(memory_gib * GIB), gpus=gpus)


def write_model(folder: Path, **changes: Any) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 48,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


def test_synthias_kv_cache_takes_192_kib_a_token(tmp_path: Path) -> None:
    geometry = read_geometry(str(write_model(tmp_path)))
    assert geometry is not None
    assert (geometry.kv_bytes_per_token, geometry.weight_bytes) == (192 * 1024, 1000)
    doubled = read_geometry(str(tmp_path), "float32")
    assert doubled is not None
    assert (doubled.kv_bytes_per_token, doubled.weight_bytes) == (384 * 1024, 2000)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="GPT2"):
        read_geometry(str(write_model(tmp_path, architectures=["GPT2LMHeadModel"])))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"config\.json"):
        read_geometry(str(tmp_path))
    with pytest.raises(SetupError, match="no such folder"):
        read_geometry(str(tmp_path / "nowhere"))


def test_half_of_the_free_memory_is_kv_cache() -> None:
    kv_bytes = choose_kv_bytes(SYNTHIA, 4096, machine(64), None)
    assert kv_bytes == (64 * GIB - int(21.5e9) - 2 * GIB) // 2


def test_no_more_kv_cache_than_can_be_used() -> None:
    small = Geometry(context=1024, heads=9, kv_bytes_per_token=1024, weight_bytes=10**8)
    assert choose_kv_bytes(small, 1024, machine(64), None) == 256 * 1024 * 1024


def test_the_demo_has_two_gigabytes_or_what_there_is() -> None:
    small = Geometry(context=8192, heads=9, kv_bytes_per_token=23040, weight_bytes=270 * 10**6)
    assert choose_kv_bytes(small, 8192, machine(64), None, demo=True) == 2 * GIB
    assert choose_kv_bytes(small, 8192, machine(4), None, demo=True) == (4 * GIB - 270 * 10**6 - 2 * GIB) // 2
    assert choose_kv_bytes(small, 8192, machine(64), 5, demo=True) == 5 * GIB


def test_a_model_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(SetupError, match=r"--engine\.max-model-len \d+ would fit"):
        choose_kv_bytes(SYNTHIA, 4096, machine(22.5), None)
    with pytest.raises(SetupError, match="smaller"):
        choose_kv_bytes(SYNTHIA, 4096, machine(8), None)


def test_a_kv_cache_under_one_context_or_over_memory_is_refused() -> None:
    with pytest.raises(SetupError, match=r"needs 0\.75"):
        choose_kv_bytes(SYNTHIA, 4096, machine(64), 0.5)
    with pytest.raises(SetupError, match="only"):
        choose_kv_bytes(SYNTHIA, 4096, machine(64), 60)


def test_gpu_memory_is_checked() -> None:
    check_gpu_memory(SYNTHIA, 4096, machine(64, gpu_gib=48), 1)
    with pytest.raises(SetupError, match="fp8"):
        check_gpu_memory(SYNTHIA, 4096, machine(64, gpu_gib=16), 1)


def gpus(*gib: float) -> Machine:
    return Machine(16, 64 * GIB, 64 * GIB, tuple(Gpu("GPU", int(each * GIB), int(each * GIB)) for each in gib))


def test_stages_share_the_weights_and_the_kv_cache() -> None:
    with pytest.raises(SetupError, match=r"1 GPU\(s\) have 13\.4 GiB"):
        check_gpu_memory(SYNTHIA, 4096, gpus(16), 1)
    check_gpu_memory(SYNTHIA, 4096, gpus(16), 1, stages=2)
    with pytest.raises(SetupError, match=r"1 GPU\(s\) in each of 2 stages have 19\.6 GiB .* fp8"):
        check_gpu_memory(SYNTHIA, 4096, gpus(12), 1, stages=2)


def test_the_smallest_of_the_gpus_that_share_a_layer_decides() -> None:
    check_gpu_memory(SYNTHIA, 4096, gpus(16, 16), 2)
    with pytest.raises(SetupError, match="fit"):
        check_gpu_memory(SYNTHIA, 4096, gpus(80, 8), 2)
