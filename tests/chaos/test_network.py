"""The network between gateway and replicas is cut, or loses every fifth packet."""

import asyncio
from collections.abc import Iterator

import pytest

from synthia_vllm.bench.replica_set import ReplicaSet
from tests.chaos.conftest import PACE
from tests.chaos.house import FULL, REPLICAS, STREAMS, Both, assert_whole, house, until
from tests.chaos.network import FAR, Impossible, Line, need_root

pytestmark = pytest.mark.chaos

# A SYN that is lost is sent again after 1 s and 3 s, whatever we do.
PATIENT = {"canary_period_s": 1.0, "canary_deadline_s": 8.0}


@pytest.fixture
def line() -> Iterator[Line]:
    need_root("ip", "nft")
    found = Line()
    try:
        found.make()
        yield found
    except Impossible as error:
        pytest.skip(f"no namespaces or packet filter here: {error}")
    finally:
        found.remove()


async def test_a_replica_is_cut_off_and_comes_back(line: Line, replicas: ReplicaSet) -> None:
    with ReplicaSet(1, options=PACE, host=FAR, prefix=line.prefix, name="far") as far:
        far.wait()
        async with house(Both(replicas, far)) as running:
            streams = running.load()
            await running.busy()
            before = {view.name: view.in_flight for view in running.pool.replicas()}
            assert before["far-1"] > 0
            line.cut()
            assert_whole(await streams)
            await until(lambda: len(running.pool.up()) == REPLICAS, running.pool.replicas)
            assert line.dropped() > 0
            line.heal()
            await running.calm(REPLICAS + 1)
            await until(lambda: far.fault("far-1")["running"] == 0)


async def test_a_fifth_of_all_packets_is_lost(line: Line) -> None:
    with ReplicaSet(REPLICAS, options=PACE, host=FAR, prefix=line.prefix, name="far") as far:
        far.wait()
        async with house(far, of_pool=PATIENT, connect_timeout=8.0) as running:
            line.lose(20)
            streams = running.load(STREAMS if not FULL else 100)
            await asyncio.sleep(1.0)
            far.kill()
            assert_whole(await streams)
            assert line.dropped() > STREAMS
            line.heal()
            await running.calm()
