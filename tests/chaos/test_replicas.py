"""Replicas are killed, hung, broken and replaced under load: no client sees it."""

import asyncio
from dataclasses import replace

import httpx
import pytest

from synthia_vllm.bench.checked_stream import COMPLETIONS, numbered, run_stream
from synthia_vllm.bench.null.tokens import expected
from synthia_vllm.bench.replica_set import ReplicaSet
from tests.chaos.conftest import PACE
from tests.chaos.house import REPLICAS, STREAMS, TOKENS, assert_whole, house, resumes, until

pytestmark = pytest.mark.chaos


def gained(before: dict[tuple[str, str], float], reason: str) -> float:
    """Requests that lost a replica this way since then, and came through."""
    after = resumes()
    return sum(value - before.get(key, 0) for key, value in after.items() if key[0] == reason and key[1] != "refused")


async def test_kill_9(replicas: ReplicaSet) -> None:
    before = resumes()
    async with house(replicas) as running:
        streams = running.load()
        await running.busy()
        first = replicas.kill(running.busiest())
        await until(lambda: first.name not in {view.name for view in running.pool.replicas()})
        replicas.kill()
        assert_whole(await streams)
        await running.calm()
    assert gained(before, "died") > 0


async def test_sigstop(replicas: ReplicaSet) -> None:
    before = resumes()
    async with house(replicas) as running:
        streams = running.load()
        await running.busy()
        name = running.busiest()
        replicas.stop(name)
        assert_whole(await streams)
        replicas.go_on(name)
        await running.calm()
    assert gained(before, "hung") > 0


async def test_the_last_replica_hangs_for_a_while(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        for name in list(replicas.listing())[1:]:
            replicas.retire(name)
        await until(lambda: len(running.pool.replicas()) == 1)
        streams = running.load()
        await running.busy()
        before, name = resumes(), running.busiest()
        for _ in range(3):  # to take its streams away would give them back to it, each time without a token
            replicas.stop(name)
            await until(lambda: not running.pool.up())
            replicas.go_on(name)
            await until(lambda: len(running.pool.up()) == 1)
        assert_whole(await streams)
        await running.calm(1)
    assert resumes() == before


async def test_sigstop_for_a_moment_moves_nobody(replicas: ReplicaSet) -> None:
    before = resumes()
    async with house(replicas, of_pool={"canary_deadline_s": 30.0}) as running:
        streams = running.load()
        await running.busy()
        name = running.busiest()
        replicas.stop(name)
        await asyncio.sleep(1.0)
        replicas.go_on(name)
        assert_whole(await streams)
        await running.calm()
    assert resumes() == before


@pytest.mark.parametrize("fault", ["dead", "hang"])
async def test_the_engine_dies_and_its_server_lives(replicas: ReplicaSet, fault: str) -> None:
    async with house(replicas) as running:
        streams = running.load()
        await running.busy()
        name = running.busiest()
        await asyncio.to_thread(replicas.fault, name, **{fault: True})
        assert_whole(await streams)
        await until(lambda: len(running.pool.up()) == REPLICAS - 1, running.pool.replicas)
        await asyncio.to_thread(replicas.fault, name, **{fault: False})
        await running.calm()


async def test_streams_that_break_again_and_again(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        for name in replicas.listing():
            await asyncio.to_thread(replicas.fault, name, break_after=TOKENS // 4)
        assert_whole(await running.load(seed=None))  # what is said again would never get beyond that token
        for name in replicas.listing():
            await asyncio.to_thread(replicas.fault, name, break_after=None)
        await running.calm()


async def test_one_answers_500(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        name = next(iter(replicas.listing()))
        await asyncio.to_thread(replicas.fault, name, status=500)
        assert_whole(await running.load())
        await until(lambda: len(running.pool.up()) == REPLICAS - 1, running.pool.replicas)
        await asyncio.to_thread(replicas.fault, name, status=None)
        await running.calm()


async def test_one_refuses_connections(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        await asyncio.to_thread(replicas.fault, next(iter(replicas.listing())), refuse_s=2.0)
        assert_whole(await running.load())
        await running.calm()


async def test_all_dead_then_back(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        streams = running.load()
        await running.busy()
        for replica in replicas.up():
            replicas.kill(replica.name)
        assert_whole(await streams)
        await running.calm()


async def test_replies_that_are_not_streamed(replicas: ReplicaSet) -> None:
    async with house(replicas) as running, httpx.AsyncClient(timeout=120, limits=httpx.Limits()) as client:
        body = {"model": "null", "prompt": "What is an orca?", "max_tokens": TOKENS}
        asked = [asyncio.create_task(client.post(f"{running.url}/v1/completions", json=body)) for _ in range(STREAMS)]
        await running.busy()
        replicas.kill(running.busiest())
        for reply in await asyncio.gather(*asked):
            assert reply.status_code == 200
            assert reply.json()["choices"][0]["text"] == "".join(expected(body, TOKENS))
            assert reply.json()["usage"]["completion_tokens"] == TOKENS
        await running.calm()


async def test_deaths_in_quick_succession() -> None:
    with ReplicaSet(REPLICAS + 2, options=PACE, restart_s=0.5, notice_s=1.0) as replicas:
        replicas.wait()
        async with house(replicas) as running:
            streams = running.load()
            await running.busy()
            for replica in replicas.up()[:REPLICAS]:  # those who moved have no token yet when the next one dies
                replicas.kill(replica.name)
                await asyncio.sleep(0.03)
            assert_whole(await streams)
            await running.calm(REPLICAS + 2)


# At once, or in the midst of its reply.
@pytest.mark.parametrize("at", [0, 9])
async def test_poison_takes_three_with_it(at: int) -> None:
    before = resumes()
    options = [*PACE, "--poison", "arsenic", "--poison-at", str(at)]
    with ReplicaSet(5, options=options, restart_s=0.5, notice_s=1.0) as replicas:
        replicas.wait()
        was = set(replicas.listing())
        async with house(replicas) as running:
            streams = running.load(STREAMS // 2)
            await running.busy(STREAMS // 2)
            asked = replace(numbered(COMPLETIONS, "a pinch of arsenic", 12), text=None)
            poisoned = await run_stream(running.url, asked)
            assert poisoned.broken is not None
            assert b"3 replicas were lost" in poisoned.offending
            assert len(poisoned.times) == max(0, at - 1)
            assert_whole(await streams)
            await running.calm(5)
            assert len(was - set(replicas.listing())) == 3
    assert resumes()["died", "refused"] - before.get(("died", "refused"), 0) == 1


async def test_rolling_replacement(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        streams = running.load()
        await running.busy()
        for old in list(replicas.listing()):
            new = replicas.add()
            await until(lambda new=new: new in {replica.name for replica in running.pool.up()})
            replicas.retire(old)
            await until(lambda old=old: old not in {view.name for view in running.pool.replicas()})
        assert_whole(await streams)
        await running.calm()
        for replica in replicas.retired():
            assert (await asyncio.to_thread(replicas.fault, replica.name))["running"] == 0


async def test_clients_that_leave_leave_nothing(replicas: ReplicaSet) -> None:
    async with house(replicas) as running:
        streams = running.load()
        await running.busy()
        replicas.kill(running.busiest())
        await asyncio.sleep(0.2)
        streams.cancel()
        await asyncio.gather(streams, return_exceptions=True)
        await running.calm()
        for replica in replicas.up():
            await until(lambda name=replica.name: replicas.fault(name)["running"] == 0)
