"""The gateway itself is killed: its streams end, and the next one on the same database starts clean."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from synthia_vllm.bench.checked_stream import COMPLETIONS, numbered, run_stream
from synthia_vllm.bench.gateway_figures import state
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.replica_set import ReplicaSet
from synthia_vllm.bench.streams import wait_for
from synthia_vllm.free_ports import free_port
from tests.chaos.house import STREAMS, TOKENS, assert_whole, until

pytestmark = pytest.mark.chaos


@contextmanager
def gateway(port: int, replicas: ReplicaSet, log: Path, *words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`synthia-vllm gateway` in front of them, listening."""
    command = [sys.executable, "-m", "synthia_vllm", "gateway", "--port", str(port), *words]
    command += [word for url in replicas.listing().values() for word in ("--upstream", url)]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        wait_for(port)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("shared", [False, True])
async def test_kill_9_of_the_gateway(
    shared: bool, replicas: ReplicaSet, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = ["--limits.concurrent-requests", "100000"]
    if shared:
        words += ["--limits.redis", request.getfixturevalue("redis_url")]
    key = make_key("ops", "--admin")
    port, log = free_port(), tmp_path / "gateway.log"
    url = f"http://127.0.0.1:{port}"
    wanted = [numbered(COMPLETIONS, f"{number}: what is an orca?", TOKENS) for number in range(STREAMS)]
    with gateway(port, replicas, log, *words) as process:
        streams = [asyncio.create_task(run_stream(url, one)) for one in wanted]
        await until(lambda: running(replicas) == STREAMS)
        process.send_signal(signal.SIGKILL)
        ended = await asyncio.gather(*streams)
        assert all("ended before" in (stream.broken or "") for stream in ended), {s.broken for s in ended}
    await until(lambda: running(replicas) == 0)  # nobody generates for the dead
    with gateway(port, replicas, log, *words):
        assert_whole(await asyncio.gather(*(run_stream(url, one) for one in wanted)))
        await until(lambda: at_rest(url, key), lambda: state(url, key))
    assert "ledger_gap" in log.read_text()


def running(replicas: ReplicaSet) -> int:
    return sum(replicas.fault(replica.name)["running"] for replica in replicas.up())


def at_rest(url: str, key: str) -> bool:
    found = state(url, key)
    counted = [found[name] for name in ("queued_requests", "queued_tokens", "in_flight_requests", "in_flight_tokens")]
    users = [user.get("used", {}).get("concurrent_requests", 0) for user in found["users"].values()]
    return not any(counted) and not any(users)
