"""On real processes: one that looks like vLLM's worker, bound to a core, and one that starts."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores and Linux")
WORKER = """
import os, sys, time
open("/proc/self/comm", "w").write("null::Worker")
os.sched_setaffinity(0, {int(sys.argv[1])})
print("bound", flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker() -> Iterator[int]:
    """A stand-in for a worker of vLLM; the core that it is bound to."""
    with subprocess.Popen([sys.executable, "-c", WORKER, str(CORES[0])], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield CORES[0]
        process.kill()


def where(code: str) -> set[int]:
    """The cores of a new process after it has run this."""
    imports = "from synthia_vllm.cluster.cores import leave_busy_cores, make_room, return_to_all_cores, stay_on"
    report = "import os, sys; sys.stdout.write(','.join(map(str, os.sched_getaffinity(0))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{code}\n{report}"], stdout=subprocess.PIPE, text=True, check=True
    )
    return {int(core) for core in done.stdout.split(",")}


def test_a_start_keeps_off_the_cores_of_workers(worker: int) -> None:
    assert worker not in where("leave_busy_cores('null::Worker')")


def test_it_returns_to_all_cores(worker: int) -> None:
    assert where("leave_busy_cores('null::Worker'); return_to_all_cores()") == set(CORES)


def test_its_share_is_counted_among_all_cores(worker: int) -> None:
    assert where("leave_busy_cores('null::Worker'); stay_on(set())") == set(CORES)


def test_what_it_starts_is_on_the_same_cores() -> None:
    again = "os.execv(sys.executable, [sys.executable, '-c', 'import os; print(*os.sched_getaffinity(0), sep=\",\")'])"
    assert where(f"stay_on({{{CORES[1]}}}); import os, sys; {again}") == {CORES[1]}


ENGINE = """import os, subprocess, sys
engine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
"""
SEEN = """
seen = os.sched_getaffinity(engine.pid)
engine.kill()
os.sched_setaffinity(0, seen)
"""


def test_an_engine_makes_room_for_a_newcomer(worker: int) -> None:
    assert where(f"{ENGINE}make_room(set(), 'null::Worker'){SEEN}") == set(CORES) - {worker}


def test_an_engine_whose_only_core_is_shared_stays(worker: int) -> None:
    code = f"{ENGINE}os.sched_setaffinity(engine.pid, {{{worker}}})\nmake_room({{{worker}}}, 'null::Worker'){SEEN}"
    assert where(code) == {worker}


def test_an_engine_takes_its_cores_back() -> None:
    code = f"{ENGINE}os.sched_setaffinity(engine.pid, {{{CORES[0]}}})\nmake_room(set(), 'null::Worker'){SEEN}"
    assert where(code) == set(CORES)
