import pytest

from synthia_vllm.bench.roofline import bound, needs, points
from synthia_vllm.bench.run_file import Roofline
from synthia_vllm.bench.summary import Summary
from tests.bench.synthetic import ROOFLINE, closed, run

SMOLLM = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30,
    "intermediate_size": 1536, "vocab_size": 49152,
}  # fmt: skip
SOLAR = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 48,
    "intermediate_size": 14336, "vocab_size": 32000,
}  # fmt: skip
EVEN = Roofline(
    bandwidth_bytes_s=1000, matrix_flops_s=4000, dtype="bfloat16", weight_bytes=1000, kv_bytes_per_token=1,
    flops_per_token=500,
)  # fmt: skip


def test_the_demo_models_weights_are_its_135_million_parameters() -> None:
    assert needs(SMOLLM).weight_bytes == pytest.approx(2 * 134.5e6, rel=0.01)


def test_synthias_cache_takes_192_kib_a_token() -> None:
    assert needs(SOLAR).kv_bytes_per_token == 192 * 1024


def test_a_token_costs_two_operations_a_weight() -> None:
    assert needs(SOLAR).flops_per_token == needs(SOLAR).weight_bytes  # two bytes a weight


def test_a_small_batch_is_bound_by_memory_and_shares_the_weights() -> None:
    assert (bound(EVEN, 1), bound(EVEN, 4)) == (1.0, 4.0)


def test_a_large_batch_is_bound_by_operations() -> None:
    assert bound(EVEN, 100) == pytest.approx(8.0)


def test_caches_are_read_for_each_sequence() -> None:
    assert bound(EVEN, 2, context_tokens=500) == pytest.approx(1.0)


def test_a_server_is_held_against_the_bound_at_its_batch() -> None:
    found = points(Summary(run([closed(8, requests=16)], roofline=ROOFLINE)))
    assert [(point.server, point.batch) for point in found] == [("ours", 8)]
    assert found[0].bound == pytest.approx(bound(ROOFLINE, 8, 32 + 64 / 2))
