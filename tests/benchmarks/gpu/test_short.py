import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import servers, short
from benchmarks.gpu.geometry import TINY, make_model
from benchmarks.gpu.measure import OURS, OURS_FP8, VLLM, VLLM_FP8, Loads
from benchmarks.gpu.servers import Bench, Variant
from synthia_vllm.bench.peers import Up
from synthia_vllm.bench.run_file import Server
from synthia_vllm.engine.hardware import GIB, Gpu, Machine

GPU = Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, 80000 * 2**20)


class NoFleet:
    """Notes what is started and stopped."""

    told: list[str] = []  # noqa: RUF012

    def __init__(self, *_: Any) -> None:
        self.told.clear()

    def __enter__(self) -> "NoFleet":
        return self

    def __exit__(self, *_: object) -> None:
        self.told.append("end")

    def start(self, variants: Sequence[Variant], most_gib: float | None = None) -> list[Up]:
        self.told.append("+ " + " ".join(variant.name for variant in variants))
        return [Up(Server(name=variant.name, title="")) for variant in variants]

    def stop(self, *names: str) -> None:
        self.told.append("- " + " ".join(names))


class NoRecorder:
    def take_servers(self, servers: Sequence[Server]) -> None:
        pass


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(make_model(TINY, tmp_path_factory.mktemp("model")), Machine(16, 128 * GIB, 100 * GIB, (GPU,)))


def run(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    stages: Sequence[str] = short.STAGES,
    *,
    roomy: bool = False,
) -> tuple[list[str], list[list[str]]]:
    loads: list[list[str]] = []

    async def closed_loops(servers: list[Up], parts: Sequence[Any], number: int, *_: Any) -> None:
        loads.append([f"{part.workload.streams} {' '.join(part.servers or ())}".strip() for part in parts])

    monkeypatch.setattr(short, "Fleet", NoFleet)
    monkeypatch.setattr(short, "closed_loops", closed_loops)
    monkeypatch.setattr(short, "Clients", lambda count: nullcontext())
    monkeypatch.setattr(short, "fit_together", lambda *_: roomy)
    done: list[int] = []
    until = time.monotonic() + seconds
    recorder: Any = NoRecorder()
    short.measure_within(
        bench,
        Loads(short.STREAMS),
        recorder,
        Path(),
        lambda text: None,
        until,
        lambda: done.append(len(loads)),
        stages,
    )
    assert done == list(range(1, len(loads) + 1))
    return NoFleet.told, loads


def test_the_pair_comes_first_and_ours_stays_until_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told, loads = run(bench, monkeypatch, 1000)
    assert told == ["+ ours vllm", "- vllm", "+ card card-batched", "- card", "+ ours-fp8 vllm-fp8", "end"]
    assert loads == [
        ["64", "1", "8", "256"],
        ["64 ours card-batched", "1 ours card", "64 card"],
        ["64", "1"],
    ]


def test_where_all_four_have_room_fp8_is_measured_beside_bf16(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told, loads = run(bench, monkeypatch, 1000, roomy=True)
    assert told == ["+ ours vllm ours-fp8 vllm-fp8", "- vllm ours-fp8 vllm-fp8", "+ card card-batched", "- card", "end"]
    assert loads[0] == ["64", "1", "8", "256"]
    told, loads = run(bench, monkeypatch, 1000, ["pair", "fp8"], roomy=True)
    assert told == ["+ ours vllm ours-fp8 vllm-fp8", "- vllm ours-fp8 vllm-fp8", "end"]
    told, loads = run(bench, monkeypatch, 1000, ["fp8"], roomy=True)
    assert told == ["+ ours ours-fp8 vllm-fp8", "end"]


def test_a_gpu_has_room_or_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "weights_of", lambda bench, variant: 10 * GIB if variant.options else 20 * GIB)
    four = (OURS, VLLM, OURS_FP8, VLLM_FP8)
    h200 = dataclasses.replace(bench.machine, gpus=(Gpu("NVIDIA H200", 143771 * 2**20, 143000 * 2**20),))
    assert servers.fit_together(dataclasses.replace(bench, machine=h200), four, 13.2)
    assert not servers.fit_together(bench, four, 13.2)
    assert servers.fit_together(bench, four[:2], 13.2)
    assert not servers.fit_together(
        dataclasses.replace(bench, machine=dataclasses.replace(bench.machine, gpus=())), four, 1
    )


def test_a_stage_that_had_no_time_can_be_run_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told, loads = run(bench, monkeypatch, 1000, ["fp8"])
    assert told == ["+ ours ours-fp8 vllm-fp8", "end"]
    assert loads == [["64", "1"]]
    told, loads = run(bench, monkeypatch, 1000, ["card", "fp8"])
    assert told == ["+ ours card card-batched", "- card", "+ ours-fp8 vllm-fp8", "end"]


@pytest.mark.parametrize(("seconds", "stages"), [(100, 2), (10, 1)])
def test_a_stage_that_would_not_end_in_time_is_not_begun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seconds: float, stages: int
) -> None:
    told, loads = run(bench, monkeypatch, seconds)
    assert len(loads) == stages
    assert told[-1] == "end"


def test_the_most_streams_fill_the_cache(bench: Bench) -> None:
    per_token = 2 * 2 * 1 * 32 * 2  # keys and values, layers, heads, their size, bytes
    assert short.used_gib(bench, Loads(short.STREAMS)) == pytest.approx(1.1 * 256 * 256 * per_token / GIB)
