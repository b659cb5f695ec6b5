from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.engine import profiles
from synthia_vllm.engine.arguments import plan_engine
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.engine.profiles import Profile, choose_profile, geometry_of, read_profile, write_profile
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import EngineSettings, Settings
from tests.engine.test_memory import write_model

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 48,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
}
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 256,
    "scheduling_policy": "priority",
    "async_scheduling": True,
    "enable_chunked_prefill": False,
    "cudagraph_capture_sizes": [1, 2, 4],
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}
PROFILE = Profile(name="h200-11b", hardware="NVIDIA H200", geometry=geometry_of(CONFIG), options=OPTIONS)


def machine(*gpus: str) -> Machine:
    return Machine(16, 128 * GIB, 100 * GIB, tuple(Gpu(name, 141 * GIB, 140 * GIB) for name in gpus))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    write_profile(PROFILE, tmp_path / "h200-11b.yaml")
    return tmp_path


def test_a_profile_is_found_by_hardware_and_geometry(folder: Path) -> None:
    assert choose_profile("auto", machine("NVIDIA H200"), CONFIG) == PROFILE


@pytest.mark.parametrize("option", ["quantization", "kv_cache_dtype"])
def test_one_that_changes_what_the_model_says_is_taken_only_by_name(folder: Path, option: str) -> None:
    fewer = PROFILE.model_copy(update={"name": "h200-11b-fp8", "options": {option: "fp8"}})
    write_profile(fewer, folder / "h200-11b-fp8.yaml")
    assert choose_profile("auto", machine("NVIDIA H200"), CONFIG) == PROFILE
    assert choose_profile("h200-11b-fp8", machine("NVIDIA H200"), CONFIG) == fewer
    (folder / "h200-11b.yaml").unlink()
    assert choose_profile("auto", machine("NVIDIA H200"), CONFIG) is None


def test_the_one_that_comes_with_this_version_is_found_for_synthia() -> None:
    found = choose_profile("auto", machine("NVIDIA H200"), CONFIG)
    assert found is not None
    assert found.measured["gain over vLLM's defaults"] >= 1.15
    assert int(found.arguments([])[1]) >= found.options["max_num_seqs"]  # vLLM refuses fewer tokens a step


@pytest.mark.parametrize(
    ("gpus", "config"),
    [
        (("NVIDIA H100 80GB HBM3",), CONFIG),
        ((), CONFIG),
        (("NVIDIA H200",), {**CONFIG, "num_hidden_layers": 32}),
        (("NVIDIA H200",), None),
    ],
)
def test_another_hardware_or_model_has_none(folder: Path, gpus: tuple[str, ...], config: Any) -> None:
    assert choose_profile("auto", machine(*gpus), config) is None


def test_none_and_a_name_are_obeyed(folder: Path) -> None:
    assert choose_profile("none", machine("NVIDIA H200"), CONFIG) is None
    assert choose_profile("h200-11b", machine(), None) == PROFILE
    assert choose_profile(str(folder / "h200-11b.yaml"), machine(), None) == PROFILE


def test_a_name_that_is_none_is_refused_with_those_there_are(folder: Path) -> None:
    with pytest.raises(SetupError, match=r"--engine.profile nonsense: .* there are auto, none, h200-11b"):
        choose_profile("nonsense", machine(), CONFIG)


def test_a_file_that_is_no_profile_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\n")
    with pytest.raises(SetupError, match=r"x\.yaml is no profile"):
        read_profile(tmp_path / "x.yaml")


def test_options_become_words_and_given_ones_win() -> None:
    words = PROFILE.arguments(["--max-num-seqs", "8", "--no-async-scheduling"])
    assert words == [
        *("--scheduling-policy", "priority"),
        "--no-enable-chunked-prefill",
        *("--cudagraph-capture-sizes", "1", "2", "4"),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'),
    ]


def test_an_option_given_with_an_equals_sign_wins_too() -> None:
    assert "--max-num-seqs" not in PROFILE.arguments(["--max-num-seqs=8"])


def test_the_plan_takes_a_profile_and_what_follows_the_dashes_wins(tmp_path: Path) -> None:
    write_profile(PROFILE, tmp_path / "mine.yaml")
    settings = Settings(model=str(write_model(tmp_path)), engine=EngineSettings(profile=str(tmp_path / "mine.yaml")))
    plan = plan_engine(settings, machine("NVIDIA H200"), ["--max-num-seqs", "8"])
    assert plan.profile is not None
    assert plan.profile.startswith("h200-11b: --scheduling-policy priority")
    assert plan.arguments.count("--max-num-seqs") == 1
    assert plan.arguments[plan.arguments.index("--scheduling-policy") + 1] == "priority"


def test_without_a_profile_the_plan_says_so(tmp_path: Path) -> None:
    assert plan_engine(Settings(model=str(write_model(tmp_path))), machine("NVIDIA H200")).profile is None
