"""The chaos benchmark's own parts: its processes, its figures, its table."""

import asyncio
import json
import os
import time

import pytest

from benchmarks.chaos import markdown
from synthia_vllm.bench.chaos import Kill, figures
from synthia_vllm.bench.chaos_demo import kill_one, pid_command
from synthia_vllm.bench.checked_stream import COMPLETIONS, CheckedStream, numbered
from synthia_vllm.bench.replica_set import ReplicaSet


def test_a_killed_engine_is_listed_for_a_while_and_replaced() -> None:
    with ReplicaSet(2, restart_s=0.3, notice_s=0.6) as replicas:
        replicas.wait()
        first, other = replicas.up()
        replicas.kill(first.name)
        assert first.name in replicas.listing()  # as Serve does not know yet
        time.sleep(0.7)
        assert first.name not in replicas.listing()
        replicas.wait()
        names = set(replicas.listing())
        assert len(names) == 2
        assert other.name in names
        assert replicas.named((names - {other.name}).pop()).port != first.port
        pids = [replica.process.pid for replica in replicas.replicas]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ports_are_kept_if_the_gateway_is_told_only_once() -> None:
    with ReplicaSet(1, restart_s=0.0, keep_ports=True) as replicas:
        replicas.wait()
        before = set(replicas.listing().values())
        replicas.kill()
        replicas.wait()
        assert set(replicas.listing().values()) == before


async def test_figures_take_the_longest_pauses_of_as_many_as_were_held() -> None:
    streams = []
    for pause in (0.5, 0.6, 3.0):
        stream = CheckedStream(numbered(COMPLETIONS, "x", 3), "null")
        stream.times.extend([1.0, 1.0 + pause, 1.5 + pause])
        streams.append(stream)
    streams[0].broken = "because"
    found = figures(streams, [Kill(1.2, "null-1", 1)], {"every": 0.1})
    assert found["summary"]["pause at a kill, s, max"] == found["summary"]["pause at a kill, s, p50"] == 3.0
    assert found["summary"]["broken streams"] == 1
    assert found["reasons"] == [("because", 1)]
    assert json.loads(json.dumps(found))["kills"] == [["null-1", 1]]
    table = markdown({"scenarios": {"null": found, "demo": {"summary": {"streams": 5}}}})
    assert table.startswith("| figure | null | demo |\n|---|---|---|\n| streams | 3 | 5 |\n")


async def test_pids_are_found_in_the_clusters_status_and_in_plain_text() -> None:
    replicas = [{"name": "a", "state": "RUNNING", "pid": 11}, {"name": "b", "state": "STARTING", "pid": None}]
    others = [{"name": "c", "state": "RUNNING", "pid": 12}]
    status = {"applications": {"engine": {"replicas": replicas}, "gateway": {"replicas": others}}}
    assert await pid_command(f"echo '{json.dumps(status)}'")() == [11]
    assert await pid_command("echo 7 8")() == [7, 8]
    assert await pid_command("echo 7")() == [7]


async def test_kill_one() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    assert kill_one([process.pid]) == process.pid
    assert await process.wait() == -9
