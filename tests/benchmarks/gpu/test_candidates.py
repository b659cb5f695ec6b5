"""Candidates held against vLLM's defaults: which profile is written, and what it tells."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import candidates
from benchmarks.gpu.candidates import DEFAULT, Quick, tune_within
from benchmarks.gpu.geometry import TINY, make_model
from benchmarks.gpu.servers import Bench, Variant
from synthia_vllm.bench.client import Target
from synthia_vllm.bench.peers import Up
from synthia_vllm.bench.run_file import Server
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.engine.profiles import read_profile

H200 = Machine(16, 128 * GIB, 100 * GIB, (Gpu("NVIDIA H200", 141 * GIB, 140 * GIB),))
SETS = ({"max_num_seqs": 64}, {"max_num_seqs": 256}, {"quantization": "fp8"})


def tuned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[str, Sequence[float]],
    missing: Sequence[str] = (),
    seconds: float = 1000,
    rounds: int = 3,
) -> list[str]:
    """`rates`: of each server, round by round."""

    class OnlyFleet:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> "OnlyFleet":
            return self

        def __exit__(self, *_: object) -> None: ...

        def start(self, variants: Sequence[Variant], most_gib: float) -> list[Up]:
            return [
                Up(Server(name=one.name, title=""), None if one.name in missing else Target("http://x", "x"))
                for one in variants
            ]

    async def goodput(target: Target, name: str, *_: Any, seed: int, **__: Any) -> float:
        return rates[name][seed - 1]

    async def nothing(*_: Any) -> None: ...

    monkeypatch.setattr(candidates, "Fleet", OnlyFleet)
    monkeypatch.setattr(candidates, "Clients", lambda count: nullcontext())
    monkeypatch.setattr(candidates, "goodput", goodput)
    monkeypatch.setattr(candidates, "warm_up", nothing)
    told: list[str] = []
    tune_within(
        Bench(make_model(TINY, tmp_path / "model"), H200),
        SETS,
        Quick(rounds=rounds),
        tmp_path / "profiles",
        "h200-tiny",
        tmp_path,
        told.append,
        time.monotonic() + seconds,
        dummy=True,
    )
    return told


def test_the_best_of_the_model_as_it_is_and_of_fp8_have_a_profile_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {
        DEFAULT: (10, 20, 10),
        "candidate-0": (12, 12, 12),
        "candidate-1": (15, 20, 20),
        "candidate-2": (30, 30, 30),
    }
    tuned(tmp_path, monkeypatch, rates)
    found = read_profile(tmp_path / "profiles" / "h200-tiny.yaml")
    assert (found.options, found.hardware) == (SETS[1], "NVIDIA H200")
    assert found.measured["gain over vLLM's defaults"] == 1.5  # the median of 1.5, 1 and 2
    assert found.measured["defaults, profile"] == [[10, 15], [20, 20], [10, 20]]
    assert len(found.measured["trials"]) == 3
    assert read_profile(tmp_path / "profiles" / "h200-tiny-fp8.yaml").options == SETS[2]


def test_without_vllms_defaults_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tuned(tmp_path, monkeypatch, {}, [DEFAULT])
    assert told == ["vLLM's defaults did not start: nothing to hold candidates against"]
    assert not (tmp_path / "profiles").exists()


def test_candidates_that_did_not_start_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(tmp_path, monkeypatch, {DEFAULT: (0,), "candidate-0": (5,)}, ["candidate-1", "candidate-2"], rounds=1)
    assert [file.name for file in (tmp_path / "profiles").iterdir()] == ["h200-tiny.yaml"]
    found = read_profile(tmp_path / "profiles" / "h200-tiny.yaml")
    assert found.options == SETS[0]
    assert "gain over vLLM's defaults" not in found.measured  # the defaults held at no rate


def test_the_first_round_is_kept_where_there_is_no_time_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = dict.fromkeys((DEFAULT, "candidate-0", "candidate-1", "candidate-2"), (10.0, 10.0, 10.0))
    told = tuned(tmp_path, monkeypatch, rates, seconds=0)
    assert told[-1].startswith("1 of 3 rounds")
    assert read_profile(tmp_path / "profiles" / "h200-tiny.yaml").measured["gain over vLLM's defaults"] == 1
