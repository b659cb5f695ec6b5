from pathlib import Path
from typing import Any

from benchmarks.gpu.geometry import TINY, make_model
from benchmarks.gpu.goodput import Objective
from benchmarks.gpu.search import Options
from benchmarks.gpu.servers import Bench
from benchmarks.gpu.tune import Tuner, profile_name, tune
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.engine.profiles import choose_profile, geometry_of, read_profile

H200 = Machine(16, 128 * GIB, 100 * GIB, (Gpu("NVIDIA H200", 141 * GIB, 140 * GIB),))


class FakeTuner(Tuner):
    """More sequences are better, up to 256."""

    def compare(self, best: Options, candidate: Options) -> list[tuple[float, float]]:
        return [(self.value(best), self.value(candidate))] * 2

    def against_defaults(self, best: Options) -> list[tuple[float, float]]:
        return [(10.0, 12.5)] * 3

    def value(self, options: Options) -> float:
        return float(min(256, options.get("max_num_seqs", 32)))


def test_the_profile_that_is_written_is_the_one_that_serve_finds(tmp_path: Path) -> None:
    told: list[str] = []
    bench = Bench(make_model(TINY, tmp_path / "model"), H200)
    tuner = FakeTuner(bench, Objective(), 2, tmp_path, told.append, dummy=True)
    file = tmp_path / "h200-tiny.yaml"
    profile = tune(tuner, {"max_num_seqs": (64, 256, 512)}, file)
    assert profile.options == {"max_num_seqs": 256}
    assert profile.measured["gain over vLLM's defaults"] == 1.25
    config: dict[str, Any] = dict(TINY)
    found = choose_profile(str(file), H200, config)
    assert found is not None
    assert found.options == profile.options
    assert (read_profile(file).hardware, read_profile(file).geometry) == ("NVIDIA H200", geometry_of(config))
    assert told[-1] == "max_num_seqs 512: 1.000, 1.000: left"


def test_profiles_are_named_by_chip_and_model(tmp_path: Path) -> None:
    assert profile_name(Bench(tmp_path, H200), "synthia") == "h200-11b"
    assert profile_name(Bench(tmp_path, Machine(2, GIB, GIB, ())), "tiny") == "cpu-tiny"
