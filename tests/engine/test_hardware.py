"""What a container may use of its machine."""

import os
from pathlib import Path

import pytest

from synthia_vllm.engine import hardware
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.hardware import (
    CPU_BINDING,
    computes_in_half_precision,
    cpu_quota,
    memory_limit,
    physical_cores,
    usable_cpus,
    within_quota,
)


def limits(folder: Path, **files: str) -> Path:
    """A container's cgroup, of v1 where `cpu.max` is not among the files; __ stands for a dot."""
    for name, text in files.items():
        file = folder / ("cpu.max" if name == "cpu__max" else f"cpu/{name.replace('__', '.')}")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu__max": "200000 100000"}, 2.0),
        ({"cpu__max": "150000 100000"}, 1.5),
        ({"cpu__max": "max 100000"}, None),
        ({"cpu__cfs_quota_us": "400000", "cpu__cfs_period_us": "100000"}, 4.0),
        ({"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_is_read(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(limits(tmp_path, **files)) == quota


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("memory.max", "8589934592", 2**33),
        ("memory.max", "max", None),
        ("memory/memory.limit_in_bytes", "8589934592", 2**33),
        ("memory/memory.limit_in_bytes", "9223372036854771712", None),
        ("memory.high", "1", None),
    ],
)
def test_a_containers_memory_is_read(tmp_path: Path, file: str, text: str, limit: int | None) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    assert memory_limit(tmp_path) == limit


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("flags\t\t: fpu sse2 avx2 fma\n", False),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx512fp16x\n", False),
        ("Features\t: fp asimd bf16\n", True),  # not x86
    ],
)
def test_whether_16_bit_numbers_are_fast_is_in_the_cpus_flags(tmp_path: Path, cpuinfo: str, fast: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}")
    assert computes_in_half_precision(tmp_path / "cpuinfo") == fast


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """64 cores of two threads: CPU n and CPU n + 64."""
    monkeypatch.setattr(hardware, "core_of", lambda cpu: str(cpu % 64))
    return set(range(128))


@pytest.mark.parametrize(("quota", "cores"), [(2.0, 2), (2.9, 2), (0.5, 1), (32.0, 32)])
def test_no_more_cores_than_the_quota_lasts_for(many_cores: set[int], quota: float, cores: int) -> None:
    found = within_quota(many_cores, quota)
    assert found < many_cores
    assert len(found) == len(physical_cores(found)) == cores
    assert within_quota(found, quota) == found  # of a process that was bound already


@pytest.mark.parametrize("quota", [None, 64.0, 100.0])
def test_a_quota_that_is_no_limit_changes_nothing(many_cores: set[int], quota: float | None) -> None:
    assert within_quota(many_cores, quota) == many_cores


def test_containers_on_one_machine_take_different_cores(many_cores: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()
    for pod in range(16):
        monkeypatch.setattr("socket.gethostname", lambda pod=pod: f"engine-{pod}")
        taken.add(min(within_quota(many_cores, 8)))
    assert len(taken) > 4


@pytest.mark.skipif(len(physical_cores(usable_cpus())) < 2, reason="needs two cores")
@pytest.mark.parametrize(("binding", "bound"), [("auto", True), ("0-1", False)])
def test_an_engine_that_binds_itself_inherits_what_the_quota_lasts_for(
    monkeypatch: pytest.MonkeyPatch, binding: str, bound: bool
) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 1.0)
    monkeypatch.setenv(CPU_BINDING, binding)
    assert hardware.inspect_machine().cpus == 1
    try:
        EnginePlan("model", "name", [], {CPU_BINDING: binding}).apply_environment()
        assert (len(os.sched_getaffinity(0)) == 1) is bound
    finally:
        os.sched_setaffinity(0, before)
