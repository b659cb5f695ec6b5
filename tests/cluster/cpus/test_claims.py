"""On real processes: some that hold claims, and one that starts, or shares its cores."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from synthia_vllm.cluster.cpus.claims import Claim, Claims, share_cores, wanted_cpus
from synthia_vllm.engine import hardware
from synthia_vllm.engine.hardware import core_of, usable_cpus

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2 or core_of(CORES[0]) == core_of(CORES[1]), reason="needs two cores")
HOLDER = """
import sys, time
from pathlib import Path
from synthia_vllm.cluster.cpus.claims import Claims
Claims(Path(sys.argv[1])).make({int(cpu) for cpu in sys.argv[2:]})
print("claimed", flush=True)
time.sleep(60)
"""
STARTER = """
import os, sys
from pathlib import Path
from synthia_vllm.cluster.cpus.claims import Claims, bind, start_on_free_cores
claims = Claims(Path(sys.argv[1]))
start_on_free_cores(claims)
exec(sys.argv[2])
print(*os.sched_getaffinity(0), sep=",")
"""
Hold = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts processes that claim these CPUs."""
    started = []

    def start(*cpus: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", HOLDER, str(tmp_path), *map(str, cpus)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def starts_on(folder: Path, code: str = "") -> set[int]:
    """The cores of a process that starts, after it has run this."""
    done = subprocess.run(
        [sys.executable, "-c", STARTER, str(folder), code], stdout=subprocess.PIPE, text=True, check=True
    )
    return {int(core) for core in done.stdout.split(",")}


def test_a_start_keeps_off_the_cores_of_others(tmp_path: Path, hold: Hold) -> None:
    hold(CORES[0])
    assert starts_on(tmp_path) == set(CORES[1:])


def test_where_all_are_taken_it_takes_half(tmp_path: Path, hold: Hold) -> None:
    hold(*CORES)
    assert starts_on(tmp_path) == set(CORES[len(CORES) // 2 :])


def test_it_says_where_it_starts(tmp_path: Path) -> None:
    hold_on = "import time; print(*os.sched_getaffinity(0), sep=',', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", STARTER, str(tmp_path), hold_on]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [claim.cpus for claim in Claims(tmp_path).others()] == [CORES]
        process.kill()


def test_a_claim_ends_with_its_process(tmp_path: Path, hold: Hold) -> None:
    holder = hold(CORES[0])
    holder.kill()  # and stays a zombie until someone waits for it
    assert starts_on(tmp_path) == set(CORES)
    assert not list(tmp_path.glob(f"{holder.pid}.json"))


def test_a_claim_ends_with_any_of_its_processes(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as engine:
        Claims(tmp_path).make({CORES[0]}, [psutil.Process(engine.pid)])
        assert starts_on(tmp_path) == set(CORES[1:])
        engine.kill()
        engine.wait()
        assert starts_on(tmp_path) == set(CORES)


def test_what_is_no_claim_is_removed(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"cpus": [0')
    assert starts_on(tmp_path) == set(CORES)
    assert not (tmp_path / "1.json").exists()


def test_it_can_have_all_cores_again(tmp_path: Path, hold: Hold) -> None:
    hold(CORES[0])
    assert starts_on(tmp_path, "bind(set())") == set(CORES)


@pytest.mark.parametrize(
    ("base", "others", "wanted"),
    [
        ([0], [], [0, 1]),  # alone: everything
        ([1], [], [1, 0]),  # its own first: its first thread is there
        ([0], [[1]], [0]),
        ([0, 1], [[1]], [0]),  # room for a newcomer
        ([1], [[1]], [1]),  # more replicas than cores
        ([0, 1], [[0], [1]], [0, 1]),
    ],
)
def test_which_cores_are_its_to_use(base: list[int], others: list[list[int]], wanted: list[int]) -> None:
    claims = [Claim([CORES[cpu] for cpu in cpus], []) for cpus in others]
    found = wanted_cpus([CORES[cpu] for cpu in base], claims)
    if not others:
        assert found[: len(base)] == [CORES[cpu] for cpu in base]
        assert {core_of(cpu) for cpu in found} == {core_of(cpu) for cpu in CORES}
    else:
        assert found == [CORES[cpu] for cpu in wanted]


def test_one_that_is_alone_keeps_to_its_containers_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 1.0)
    base = sorted(usable_cpus())
    assert wanted_cpus(base, []) == base


async def test_a_survivor_computes_on_all_cores_at_once_and_gives_them_up(tmp_path: Path, hold: Hold) -> None:
    told: list[list[int]] = []

    async def compute_on(cpus: list[int]) -> None:
        told.append(cpus)

    async def until_told(times: int) -> None:
        async with asyncio.timeout(30):
            while len(told) < times:
                await asyncio.sleep(0.05)

    other = hold(CORES[1])
    running = asyncio.create_task(share_cores(Claims(tmp_path), [CORES[0]], compute_on))
    try:
        await until_told(2)
        await asyncio.sleep(0.2)
        assert [len(cpus) for cpus in told] == [len(told[0]), 1]  # once beforehand
        other.send_signal(signal.SIGKILL)
        await until_told(3)
        await asyncio.to_thread(hold, CORES[1])
        await until_told(4)
    finally:
        running.cancel()
    assert {core_of(cpu) for cpu in told[2]} == {core_of(cpu) for cpu in CORES}
    assert told[1] == told[3] == [CORES[0]]
