import click
import pytest

from benchmarks.gpu.geometry import TINY, make_model
from benchmarks.gpu.measure import CARD, CARD_BATCHED, OURS, OURS_FP8, VLLM, VLLM_FP8, stages
from benchmarks.gpu.servers import Bench, Variant, command_of, kv_gib, tail_of
from synthia_vllm.engine.hardware import GIB, Gpu, Machine


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    gpu = Gpu("NVIDIA H200", 141 * GIB, 140 * GIB)
    return Bench(make_model(TINY, tmp_path_factory.mktemp("model")), Machine(16, 128 * GIB, 100 * GIB, (gpu,)))


def test_servers_that_share_a_gpu_share_what_the_weights_leave(bench: Bench) -> None:
    weights = sum(file.stat().st_size for file in bench.model.glob("*.safetensors"))
    pair = kv_gib(bench, (OURS, VLLM))
    assert pair == pytest.approx((0.95 * 141 * GIB - 2 * weights - 8 * GIB) / 2 / GIB, abs=0.01)
    assert kv_gib(bench, (OURS, VLLM), most=3.0) == 3.0
    assert kv_gib(bench, (OURS, VLLM), taken=40.0 * GIB) == pytest.approx(pair - 20, abs=0.01)
    assert kv_gib(bench, (OURS_FP8, VLLM_FP8)) >= pair


def test_both_ways_into_the_cards_server_are_one_process_without_a_cache(bench: Bench) -> None:
    assert kv_gib(bench, (CARD, CARD_BATCHED, OURS)) == kv_gib(bench, (CARD, OURS))


def test_what_does_not_fit_is_refused_before_it_starts(bench: Bench) -> None:
    small = Bench(bench.model, Machine(4, 8 * GIB, 8 * GIB, (Gpu("GPU", 4 * GIB, 4 * GIB),)))
    with pytest.raises(click.ClickException, match="2 servers don't fit"):
        kv_gib(small, (OURS, VLLM))


def test_plain_vllm_gets_our_arguments_and_ours_takes_no_profile(bench: Bench) -> None:
    plain, _ = command_of(VLLM_FP8, bench, 2.0)
    assert plain[plain.index("--quantization") + 1] == "fp8"
    assert "--chat-template" in plain
    ours, _ = command_of(OURS_FP8, bench, 2.0)
    assert ours[ours.index("--engine.profile") + 1] == "none"
    assert "--quantization" not in ours
    assert tail_of(OURS_FP8) == ["--", "--quantization", "fp8"]


def test_the_defaults_have_no_option_but_what_must_be_the_same(bench: Bench) -> None:
    words, environment = command_of(Variant("d", "", "vllm-default"), bench, 2.0)
    assert [word for word in words if word.startswith("--")] == [
        "--model",
        "--max-model-len",
        "--kv-cache-memory-bytes",
    ]
    assert environment == {}


def test_each_stage_has_the_streams_it_is_for(bench: Bench) -> None:
    assert [list(stage.streams) for stage in stages((1, 8, 64, 256))] == [[1, 8, 64, 256], [1, 8, 64, 256], [1, 64]]
    assert list(stages((4, 8))[-1].streams) == [4]
