import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.engine.arguments import EnginePlan, default_model, plan_engine
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings
from tests.engine.test_memory import machine, write_model


def settings(folder: Path, **groups: Any) -> Settings:
    return Settings(model=str(write_model(folder)), **groups)


def test_steps_on_a_cpu_are_short_unless_they_are_chosen(tmp_path: Path) -> None:
    def steps(*given: str) -> list[str]:
        arguments = plan_engine(settings(tmp_path), machine(24), given).arguments
        return [arguments[at + 1] for at, option in enumerate(arguments) if option == "--max-num-batched-tokens"]

    assert steps() == ["256"]
    assert steps("--max-num-batched-tokens", "512") == ["512"]
    assert steps("--max-num-seqs", "400") == []


def test_the_model_follows_the_hardware() -> None:
    assert default_model(machine(24)) == "demo"
    assert default_model(machine(24, gpu_gib=80)) == "migtissera/Synthia-v3.0-11B"


def test_a_cpu_gets_eager_mode_and_its_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")  # any program will do
    plan = plan_engine(settings(tmp_path), machine(24))
    assert "--enforce-eager" in plan.arguments
    assert plan.environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert "libiomp5" in plan.environment["LD_PRELOAD"]
    assert plan.environment["KMP_USE_YIELD"] == "0"
    assert "--enforce-eager" not in plan_engine(settings(tmp_path, engine={"compile": True}), machine(24)).arguments


def dtype(folder: Path, memory_gib: float, *extra: str, half_precision: bool = False, **groups: Any) -> str:
    """What `serve` takes on a CPU; without half_precision on one that has no fast 16-bit numbers."""
    where = replace(machine(memory_gib), half_precision=half_precision)
    arguments = plan_engine(settings(folder, **groups), where, extra).arguments
    return arguments[arguments.index("--dtype") + 1]


def test_a_cpu_without_fast_16_bit_numbers_computes_in_float32(tmp_path: Path) -> None:
    assert dtype(tmp_path, 24) == "float32"
    assert dtype(tmp_path, 24, half_precision=True) == "auto"
    assert dtype(tmp_path, 24, engine={"dtype": "bfloat16"}) == "bfloat16", "what is asked for holds"
    assert dtype(tmp_path, 24, "--dtype", "bfloat16") == "auto", "and what vLLM itself is told"
    assert dtype(tmp_path, 24, "--quantization=fp8") == "auto"


def test_float32_is_not_taken_where_the_model_fits_in_16_bits_alone(tmp_path: Path) -> None:
    whole = 4096 * 384 / 2**20 + 2  # GiB: one context in float32, and the engine's own
    assert dtype(tmp_path, whole + 0.1) == "float32"
    assert dtype(tmp_path, whole - 0.1) == "auto"
    assert dtype(tmp_path, 24, engine={"kv_cache_gib": 1.0}) == "auto", "a context in float32 takes one and a half"


def test_a_quantized_model_keeps_its_own_types(tmp_path: Path) -> None:
    write_model(tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    arguments = plan_engine(Settings(model=str(tmp_path)), replace(machine(24), half_precision=False)).arguments
    assert arguments[arguments.index("--dtype") + 1] == "auto"


def test_an_openmp_that_is_preloaded_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libgomp.so.1")
    preload = plan_engine(settings(tmp_path), machine(24)).environment["LD_PRELOAD"]
    assert preload.endswith("/usr/lib/libgomp.so.1")
    assert "libiomp5" not in preload


def test_without_a_compiler_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert plan_engine(settings(tmp_path), machine(24)).environment["TORCHDYNAMO_DISABLE"] == "1"
    with pytest.raises(SetupError, match=r"--engine\.compile"):
        plan_engine(settings(tmp_path, engine={"compile": True}), machine(24))


def test_gpus_share_the_model_as_far_as_its_heads_divide(tmp_path: Path) -> None:
    gpu = Gpu("GPU", 80 * GIB, 80 * GIB)
    plan = plan_engine(settings(tmp_path), Machine(8, 64 * GIB, 64 * GIB, (gpu,) * 3))
    at = plan.arguments.index("--tensor-parallel-size")
    assert plan.arguments[at + 1] == "2"
    assert "LD_PRELOAD" not in plan.environment


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_engine_is_started_afresh_so_that_it_loads_our_plugin(tmp_path: Path, gpus: int) -> None:
    gpu = Gpu("GPU", 80 * GIB, 80 * GIB)
    plan = plan_engine(settings(tmp_path), Machine(8, 64 * GIB, 64 * GIB, (gpu,) * gpus))
    assert plan.environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"  # forked, it would keep `plugins_loaded`


def test_vllms_own_options_come_last_and_win(tmp_path: Path) -> None:
    assert plan_engine(settings(tmp_path), machine(24), ["--dtype", "float32"]).arguments[-2:] == ["--dtype", "float32"]


def test_a_context_over_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="made for 4096"):
        plan_engine(settings(tmp_path, engine={"max_model_len": 5000}), machine(24))


def test_the_engine_sends_its_spans_where_ours_go(tmp_path: Path) -> None:
    tracing = {"otlp_endpoint": "http://collector:4318/v1/traces", "protocol": "http/protobuf"}
    plan = plan_engine(settings(tmp_path, tracing=tracing), machine(24))
    at = plan.arguments.index("--otlp-traces-endpoint")
    assert plan.arguments[at + 1] == tracing["otlp_endpoint"]
    assert plan.environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert "--otlp-traces-endpoint" not in plan_engine(settings(tmp_path), machine(24)).arguments


def test_the_engines_environment_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas on Ray read their settings with it."""
    before = Settings()
    for name, value in plan_engine(settings(tmp_path), machine(24)).environment.items():
        monkeypatch.setenv(name, value)
    assert Settings() == before


def test_the_demo_is_forked_and_others_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_engine(settings(tmp_path, engine={"fork": True}), machine(24)).fork
    assert not plan_engine(settings(tmp_path), machine(24)).fork
    assert plan_engine(Settings(model="demo"), machine(24)).fork
    assert not plan_engine(Settings(model="demo", engine={"fork": False}), machine(24)).fork  # type: ignore[arg-type]
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libgomp.so.1")
    assert not plan_engine(Settings(model="demo"), machine(24)).fork
    with pytest.raises(SetupError, match=r"--engine\.fork: for CPUs with Intel's OpenMP"):
        plan_engine(settings(tmp_path, engine={"fork": True}), machine(24))


@pytest.mark.parametrize("fork", [True, False])
def test_processes_are_forked_where_that_is_planned_and_in_their_environment(
    fork: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_A_PLAN", "no")
    environments: list[str] = []
    monkeypatch.setattr("synthia_vllm.engine.fork_server.start", lambda: environments.append(os.environ["OF_A_PLAN"]))
    EnginePlan("model", "name", [], {"OF_A_PLAN": "yes"}, fork=fork).prepare_processes()
    assert os.environ["OF_A_PLAN"] == "yes"
    assert environments == (["yes"] if fork else [])
