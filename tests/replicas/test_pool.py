"""The pool in front of null engines (no model), over real sockets."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.testing import capture_logs

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.engine.port import Affinity, Capacity, Delta
from synthia_vllm.errors import Overloaded, RequestError, UpstreamLost, UpstreamTimeout
from tests.replicas.engines import (
    Answers,
    Live,
    WithoutTokensRoute,
    asking,
    breaks,
    count_of,
    event,
    pool_of,
    read,
    read_into,
    reply_to,
    streaming,
    text_of,
    until,
)


@pytest.mark.parametrize("cut", [1, 2, 7, 12])
async def test_a_sequence_goes_on_at_another_replica(live: Live, cut: int) -> None:
    engines = [NullEngine(faults=Faults(break_after=cut)), NullEngine()]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        replies = [await read(pool) for _ in range(2)]
    assert sum(engine.resumed for engine in engines) == (1 if cut > 1 else 0)
    for reply in replies:
        assert text_of(reply) == reply_to()
        assert count_of(reply) == 12
        assert [delta.finish for delta in reply if delta.finish] == ["length"]


async def test_what_has_a_state_is_said_again_elsewhere(live: Live) -> None:
    engines = [NullEngine(faults=Faults(break_after=7)), NullEngine()]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        replies = [await read(pool, asking(seed=2**63 - 1, logprobs=1)) for _ in range(2)]
    assert sum(engine.resumed for engine in engines) == 0
    assert any(one["sampling_params"].get("extra_args") for one in engines[1].asked)
    for reply in replies:
        assert (text_of(reply), count_of(reply)) == (reply_to(), 12)
        assert [place.chosen.text for delta in reply for place in delta.logprobs or ()] == [
            reply_to()[at : at + 5] for at in range(0, 60, 5)
        ]


async def test_a_vllm_that_takes_no_ids_goes_on_from_them_all_the_same(live: Live) -> None:
    engines = [NullEngine(faults=Faults(break_after=7)), NullEngine()]
    async with pool_of(*(live(WithoutTokensRoute(one)) for one in engines), routing="round_robin") as pool:
        replies = [await read(pool) for _ in range(2)]
    assert sum(engine.resumed for engine in engines) == 1
    assert [(text_of(reply), count_of(reply)) for reply in replies] == [(reply_to(), 12)] * 2


async def test_without_a_tokenizer_a_vllm_tells_the_ids_to_go_on_from(live: Live) -> None:
    engines = [NullEngine(faults=Faults(break_after=7)), NullEngine()]
    async with pool_of(*map(live, engines), tokenizer=False, routing="round_robin") as pool:
        replies = [await read(pool, asking(ids=False)) for _ in range(2)]
    assert sum(engine.resumed for engine in engines) == 1
    assert [(text_of(reply), count_of(reply)) for reply in replies] == [(reply_to(), 12)] * 2
    assert {delta.prompt_tokens for reply in replies for delta in reply} == {None, 3}


async def test_replicas_of_all_kinds_are_one_pool(live: Live) -> None:
    text = Answers(
        streaming(event({"text": " text"}), event({"text": "", "finish_reason": "stop"}), b"data: [DONE]\n\n")
    )
    apps: list[ASGIApp] = [NullEngine(), WithoutTokensRoute(NullEngine()), text]
    async with pool_of(*map(live, apps), routing="round_robin") as pool:
        kinds = {replica.endpoint.kind for replica in pool.up()}
        replies = {text_of(await read(pool)) for _ in range(6)}
        assert await pool.models() == ["null", "other"]
        assert pool.context == 64
    assert kinds == {"generate", "completions"}
    assert replies == {reply_to(), " text"}


async def test_whole_replies_are_asked_for_anew(live: Live) -> None:
    engines = [NullEngine(tokens_per_second=20, faults=Faults()), NullEngine()]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        asked = asyncio.gather(*(read(pool, asking(prompt_logprobs=1)) for _ in range(2)))
        await until(lambda: engines[0].running == 1)
        engines[0].faults.dead = True
        replies = await asked
    for reply in replies:
        assert (text_of(reply), count_of(reply)) == (reply_to(), 12)
        assert len(reply[0].prompt_logprobs or ()) == len(asking().prompt)


async def test_an_error_of_a_replica_is_tried_elsewhere_and_told_in_the_end(live: Live) -> None:
    failing = Answers(PlainTextResponse("no", 500))
    async with pool_of(live(failing), live(NullEngine()), routing="round_robin") as pool:
        replies = [await read(pool) for _ in range(2)]
        assert [text_of(reply) for reply in replies] == [reply_to()] * 2
        assert failing.asked == 1
    async with pool_of(live(failing)) as pool:
        with pytest.raises(UpstreamLost, match="answered 500: no"):
            await read(pool)


async def test_no_more_than_two_replicas_are_asked_by_a_request_that_fails(live: Live) -> None:
    failing = [Answers(PlainTextResponse("no", 500)) for _ in range(4)]
    async with pool_of(*map(live, failing)) as pool:
        with pytest.raises(UpstreamLost):
            await read(pool)
    assert sum(replica.asked for replica in failing) == 2


async def test_a_busy_replica_is_no_lost_one(live: Live) -> None:
    busy = [Answers(PlainTextResponse("backpressure", 503)) for _ in range(3)]
    async with pool_of(*map(live, busy), live(NullEngine())) as pool:
        replies = [await read(pool) for _ in range(4)]
    assert [text_of(reply) for reply in replies] == [reply_to()] * 4
    async with pool_of(live(busy[0])) as pool:
        with pytest.raises(Overloaded):
            await read(pool)


async def test_what_a_replica_refuses_is_told_at_once(live: Live) -> None:
    refused = JSONResponse({"error": {"message": "too long", "param": "prompt", "code": 400}}, 400)
    replicas = [Answers(refused) for _ in range(2)]
    async with pool_of(*map(live, replicas)) as pool:
        with pytest.raises(RequestError, match="too long") as raised:
            await read(pool)
    assert (raised.value.status, raised.value.param) == (400, "prompt")
    assert sum(replica.asked for replica in replicas) == 1


async def test_what_cannot_go_on_ends_with_one_error(live: Live) -> None:
    broken = [Answers(streaming(event({"text": "a"}), then=ConnectionResetError())) for _ in range(2)]
    got: list[Delta] = []
    async with pool_of(*map(live, broken)) as pool:
        with pytest.raises(UpstreamLost, match="can't go on elsewhere"):
            await read_into(got, pool)
    assert text_of(got) == "a"
    assert sum(replica.asked for replica in broken) == 1


async def test_what_had_nothing_yet_is_tried_elsewhere_whatever_it_is(live: Live) -> None:
    broken = Answers(breaks)
    async with pool_of(live(broken), live(NullEngine()), routing="round_robin") as pool:
        replies = [await read(pool) for _ in range(2)]
    assert broken.asked == 1
    assert [text_of(reply) for reply in replies] == [reply_to()] * 2


@pytest.mark.parametrize("fault", [{"dead": True}, {"status": 500}, {"end_after": 5}])
async def test_an_engine_that_fails_in_a_stream_is_left(live: Live, fault: dict[str, Any]) -> None:
    engines = [NullEngine(tokens_per_second=40), NullEngine(tokens_per_second=40)]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        asked = asyncio.gather(*(read(pool) for _ in range(2)))
        await until(lambda: engines[0].running == 1)
        engines[0].faults.change(fault)
        replies = await asked
    assert [(text_of(reply), count_of(reply)) for reply in replies] == [(reply_to(), 12)] * 2


async def test_who_comes_while_there_is_no_replica_waits_and_is_told(live: Live) -> None:
    async with pool_of() as pool:
        asked = asyncio.create_task(read(pool))
        await asyncio.sleep(2.5)
        assert not asked.done()
        assert pool.waiting == 1
        pool.update({"late": live(NullEngine())})
        reply = await asked
    assert reply[0].note == "waiting for a replica, 2 s so far"
    assert (len(reply[0].ids), text_of(reply)) == (0, reply_to())


async def test_who_waited_is_told_what_a_replica_refuses(live: Live) -> None:
    refused = JSONResponse({"error": {"message": "too long", "param": "prompt", "code": 400}}, 400)
    got: list[Delta] = []
    async with pool_of() as pool:
        asked = asyncio.create_task(read_into(got, pool))
        await until(lambda: bool(got))
        pool.update({"late": live(Answers(refused))})
        with pytest.raises(RequestError, match="too long"):
            await asked
    assert "waiting for a replica" in (got[0].note or "")


async def test_waiting_has_an_end() -> None:
    async with pool_of(start_wait_s=0.1) as pool:
        with pytest.raises(Overloaded, match="no replica is up"):
            await read(pool)
        assert pool.waiting == 0


async def test_without_a_replica_there_are_the_models_of_before(live: Live) -> None:
    engine = NullEngine()
    async with pool_of() as pool:
        with pytest.raises(UpstreamLost):
            await pool.models()
        pool.update({"r": live(engine)})
        await until(lambda: bool(pool.up()))
        assert await pool.models() == ["null"]
        engine.faults.dead = True
        pool.update({})
        assert await pool.models() == ["null"]


async def test_ready_means_that_a_replica_generated_a_token(live: Live) -> None:
    engine = NullEngine()
    async with pool_of(live(engine)) as pool:
        assert await pool.ready()
        engine.faults.dead = True
        await until(lambda: not pool.up())
        assert not await pool.ready()
        engine.faults.dead = False
        await until(lambda: bool(pool.up()))
        assert await pool.ready()


async def test_who_leaves_while_it_waits_leaves_nothing_behind(live: Live) -> None:
    async with pool_of() as pool:
        waiting = [asyncio.create_task(read(pool)) for _ in range(3)]
        await until(lambda: pool.waiting == 3)
        for task in waiting[:2]:
            task.cancel()
        await until(lambda: pool.waiting == 1)
        pool.update({"late": live(NullEngine())})
        await waiting[2]
        assert [view.in_flight for view in pool.replicas()] == [0]


async def test_who_leaves_a_sequence_ends_it_at_the_replica(live: Live) -> None:
    engine = NullEngine(tokens_per_second=20)
    async with pool_of(live(engine)) as pool:
        deltas = pool.generate(asking(max_tokens=1000))
        await anext(deltas)
        assert engine.running == 1
        await deltas.aclose()
        assert [view.in_flight for view in pool.replicas()] == [0]
        await until(lambda: (engine.running, engine.aborted) == (0, 1))


async def test_sequences_of_a_replica_that_is_to_stop_move_on(live: Live) -> None:
    engines = [NullEngine(tokens_per_second=10), NullEngine(tokens_per_second=10)]
    urls = [live(engine) for engine in engines]
    async with pool_of(*urls) as pool:
        asked = [asyncio.create_task(read(pool, asking(f"{n}"))) for n in range(8)]
        await until(lambda: engines[0].running + engines[1].running == 8)
        moved = engines[0].running
        pool.update({"r1": urls[1]})
        replies = await asyncio.gather(*asked)
        assert [view.name for view in pool.replicas()] == ["r1"]
    assert moved > 0
    assert engines[1].resumed == moved
    for number, reply in enumerate(replies):
        assert (text_of(reply), count_of(reply)) == (reply_to(f"{number}"), 12)


async def test_sequences_stay_on_a_replica_that_is_to_stop_while_there_is_no_other(live: Live) -> None:
    engine = NullEngine(tokens_per_second=20)
    async with pool_of(live(engine)) as pool:
        asked = asyncio.create_task(read(pool))
        await until(lambda: engine.running == 1)
        pool.update({})
        assert text_of(await asked) == reply_to()
        assert (engine.resumed, pool.replicas()) == (0, [])


async def test_a_new_replica_gets_a_few_requests_first(live: Live) -> None:
    engine = NullEngine(tokens_per_second=1)
    async with pool_of(slow_start_s=600, canary_deadline_s=5) as pool:
        asked = [asyncio.create_task(read(pool, asking(f"{n}"))) for n in range(40)]
        await until(lambda: pool.waiting == 40)
        pool.update({"new": live(engine)})
        await until(lambda: engine.running >= 8)
        await asyncio.sleep(0.5)
        assert engine.running < 16
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_capacity_is_what_the_replicas_hold_together(live: Live) -> None:
    told: list[Capacity] = []
    urls = [live(NullEngine()), live(NullEngine())]
    async with pool_of() as pool:
        pool.on_capacity = told.append
        pool.update({"a": urls[0]})
        await until(lambda: len(pool.up()) == 1)
        pool.update({"a": urls[0], "b": urls[1]})
        await until(lambda: len(pool.up()) == 2)
        pool.update({"b": urls[1]})
        pool.update({})
    assert [capacity.tokens for capacity in told if capacity.tokens] == [65536, 131072, 65536]
    assert told[-1].tokens is None  # who comes now waits in the pool


async def test_the_replicas_key_goes_to_them(live: Live) -> None:
    replica = Answers(streaming(event({"text": "a", "finish_reason": "stop"})))
    async with pool_of(live(replica), key="secret") as pool:
        await read(pool)
    assert {headers[b"authorization"] for headers in replica.headers} == {b"Bearer secret"}


async def test_each_attempt_is_told_of_and_has_an_id_of_its_own(live: Live) -> None:
    engines = [Answers(breaks), Answers(streaming(event({"text": "a", "finish_reason": "stop"})))]
    asked: list[str] = []

    def on_attempt(replica: str) -> dict[str, str]:
        asked.append(replica)
        return {"traceparent": f"00-{len(asked)}"}

    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        for _ in range(2):
            generation = asking()
            object.__setattr__(generation, "on_attempt", on_attempt)
            assert text_of(await read(pool, generation)) == "a"
    assert len(asked) == 3
    sent = [headers for engine in engines for headers in engine.headers if b"traceparent" in headers]
    assert {headers[b"x-request-id"] for headers in sent} == {b"id-hi", b"id-hi-2"}


def queued(**options: Any) -> NullEngine:
    """An engine that runs two at once, and takes a while for prompts."""
    given: dict[str, Any] = {"tokens_per_second": 40, "max_num_seqs": 2, "faults": Faults()}
    return NullEngine(**given | options)


async def test_a_crowd_takes_no_replica_out(live: Live) -> None:
    engines = [queued(tokens_per_second=8), queued(tokens_per_second=8)]
    async with pool_of(*map(live, engines), canary_deadline_s=0.5) as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}")) for n in range(12)))
        while not asked.done():
            assert await pool.ready()
            assert {view.state for view in pool.replicas()} == {"up"}
            await asyncio.sleep(0.05)
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}") for n in range(12)]
    assert [engine.resumed for engine in engines] == [0, 0]


@pytest.mark.parametrize("tells", ["still", "error"])
async def test_counters_that_lie_take_nothing_away_that_flows(live: Live, tells: str) -> None:
    engines = [queued(), queued()]
    async with pool_of(*map(live, engines), canary_deadline_s=0.5) as pool:
        for engine in engines:
            engine.faults.change({"metrics": tells})
        replies = await asyncio.gather(*(read(pool, asking(f"{n}", max_tokens=60)) for n in range(4)))
        assert {view.state for view in pool.replicas()} == {"up"}
    assert [text_of(reply) for reply in replies] == [reply_to(f"{n}", 60) for n in range(4)]
    assert [engine.resumed for engine in engines] == [0, 0]


async def test_an_engine_that_stands_still_is_out_though_its_server_answers(live: Live) -> None:
    engines = [queued(), queued()]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}")) for n in range(4)))
        await until(lambda: all(engine.running for engine in engines))
        engines[0].faults.change({"stuck": True})
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}") for n in range(4)]
        assert [view.state for view in pool.replicas()] == ["out", "up"]
        engines[0].faults.change({"stuck": False})
        await until(lambda: len(pool.up()) == 2)


@pytest.mark.parametrize("most", [2, 100])
async def test_a_gateway_that_starts_before_engines_that_others_keep_busy_finds_them(live: Live, most: int) -> None:
    """With and without a queue in them: its canary waits there, or is answered at once."""
    engine = queued(max_num_seqs=most, tokens_per_second=10)
    url = live(engine)
    async with pool_of(url) as others:
        asked = [asyncio.create_task(read(others, asking(f"{n}", max_tokens=400))) for n in range(6)]
        await until(lambda: engine.running == min(most, 6))
        async with pool_of() as pool:
            pool.update({"r": url})
            await until(lambda: len(pool.up()) == 1)
            assert await pool.ready()
        assert not any(task.done() for task in asked)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("refused", [401, 500])
async def test_one_that_works_for_others_and_refuses_the_canary_is_not_up(live: Live, refused: int) -> None:
    engine = queued(tokens_per_second=10)

    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        app = PlainTextResponse("no", refused) if scope.get("method") == "POST" else engine
        await app(scope, receive, send)

    async with pool_of(live(engine)) as others:
        asked = asyncio.create_task(read(others, asking(max_tokens=400)))
        await until(lambda: engine.running == 1)
        async with pool_of() as pool:
            pool.update({"r": live(refuses)})
            await asyncio.sleep(2)
            assert not pool.up()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_a_gateway_that_stood_still_takes_nobody_out(live: Live) -> None:
    asking_late = asyncio.Event()

    async def slow_to_tell(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == "/metrics" and asking_late.is_set():
            await asyncio.sleep(0.5)
        await engine(scope, receive, send)

    engine = queued()
    with capture_logs() as logs:
        async with pool_of(live(slow_to_tell), live(queued()), canary_period_s=0.1, canary_deadline_s=0.8) as pool:
            asking_late.set()
            await asyncio.sleep(0.3)
            time.sleep(2)  # noqa: ASYNC251
            await asyncio.sleep(1)
            assert len(pool.up()) == 2
    assert not [log for log in logs if log["event"] == "replica_out"]


async def test_the_only_replica_keeps_its_requests_though_it_stands_still(live: Live) -> None:
    engine = queued()
    async with pool_of(live(engine)) as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}")) for n in range(2)))
        await until(lambda: engine.running == 2)
        engine.faults.change({"stuck": True})
        await until(lambda: not pool.up())
        engine.faults.change({"stuck": False})
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}") for n in range(2)]
    assert engine.resumed == 0


async def test_a_canary_that_fails_takes_nothing_away(live: Live) -> None:
    answers = queued()
    refusing = False

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        if refusing and scope["type"] == "http":
            return await PlainTextResponse("aborted", 503 if scope["path"] == "/metrics" else 500)(scope, receive, send)
        return await answers(scope, receive, send)

    async with pool_of(live(engine), live(queued()), routing="round_robin") as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}", max_tokens=40)) for n in range(2)))
        await until(lambda: sum(view.in_flight for view in pool.replicas()) == 2)
        await asyncio.sleep(0.2)
        refusing = True
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}", 40) for n in range(2)]
    assert answers.resumed == 0


async def test_a_replica_that_drains_may_refuse_connections(live: Live) -> None:
    engines = [NullEngine(tokens_per_second=20), NullEngine(tokens_per_second=20)]
    refusing = False

    async def closed(scope: Scope, receive: Receive, send: Send) -> None:
        if refusing and scope["type"] == "http":
            raise ConnectionResetError("its port is closed")
        return await engines[0](scope, receive, send)

    async with pool_of(live(closed), live(engines[1]), routing="round_robin", handover_s=60) as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}", max_tokens=40)) for n in range(4)))
        await until(lambda: engines[0].running == 2)
        refusing = True
        pool.update({"r1": pool.replicas()[1].url})
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}", 40) for n in range(4)]
    assert engines[1].resumed == 0


async def test_all_that_one_death_hits_go_on_at_once(live: Live) -> None:
    survivor, idle = NullEngine(tokens_per_second=20), NullEngine()
    dies = asyncio.Event()
    prefilling = 0

    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal prefilling
        if scope["type"] == "http" and b"x-request-id" in dict(scope["headers"]):
            prefilling += 1
            await asyncio.to_thread(asyncio.run_coroutine_threadsafe(dies.wait(), loop).result)
        if dies.is_set():
            raise ConnectionResetError("killed")
        await idle(scope, receive, send)

    loop = asyncio.get_running_loop()
    async with pool_of(live(dying), live(survivor), routing="round_robin") as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}", max_tokens=60)) for n in range(40)))
        await until(lambda: (prefilling, survivor.running) == (20, 20))
        dies.set()
        await until(lambda: survivor.running == 40)  # nobody waits for another's first token
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}", 60) for n in range(40)]


async def test_a_reply_takes_no_longer_than_any_may(live: Live) -> None:
    engine = NullEngine(tokens_per_second=10)
    got: list[Delta] = []
    async with pool_of(live(engine), max_generation_s=0.5) as pool:
        with pytest.raises(UpstreamTimeout, match="max-generation-s"):
            await read_into(got, pool, asking(max_tokens=1000))
        assert text_of(got)
        await until(lambda: engine.running == 0)


async def test_a_key_that_is_refused_is_an_error_by_name(live: Live) -> None:
    with capture_logs() as logs:
        async with pool_of() as pool:
            pool.update({"r": live(PlainTextResponse("who are you?", 401))})
            await until(lambda: any(log["event"] == "replica_refuses_key" for log in logs))
            await asyncio.sleep(1.2)
    told = [log for log in logs if log["event"] == "replica_refuses_key"]
    assert [(log["replica"], log["log_level"]) for log in told] == [("r", "error")]


async def test_ready_at_zero_replicas_where_one_would_be_started(live: Live) -> None:
    async with pool_of(wakes=True) as pool:
        assert await pool.ready()
        engine = NullEngine()
        pool.update({"r": live(engine)})
        assert await pool.ready()
        await until(lambda: bool(pool.up()))
        engine.faults.dead = True
        await until(lambda: not pool.up())
        pool.update({})
        assert await pool.ready()
    async with pool_of() as pool:
        assert not await pool.ready()


async def test_a_replica_is_given_as_much_as_it_runs_while_others_have_room(live: Live) -> None:
    engines = [queued(max_num_seqs=2), queued(max_num_seqs=8)]
    told: list[Capacity] = []
    async with pool_of(*map(live, engines), max_load_factor=100) as pool:
        pool.on_capacity = told.append
        pool.update({f"r{n}": view.url for n, view in enumerate(pool.replicas())})
        home = Affinity(b"one", continued=True)
        asked = [asyncio.create_task(read(pool, replace(asking(f"{n}"), affinity=home))) for n in range(10)]
        await until(lambda: sum(view.in_flight for view in pool.replicas()) == 10)
        assert [view.in_flight for view in pool.replicas()] == [2, 8]
        await asyncio.gather(*asked)
        pool.update({"r1": pool.replicas()[1].url})
    assert told[-1].requests == 8


async def test_a_replica_that_hangs_after_a_broken_connection_is_out(live: Live) -> None:
    engines = [queued(max_num_seqs=8), queued(max_num_seqs=8)]
    async with pool_of(*map(live, engines), routing="round_robin") as pool:
        asked = asyncio.gather(*(read(pool, asking(f"{n}")) for n in range(8)))
        await until(lambda: all(engine.running == 4 for engine in engines))
        engines[0].faults.change({"stuck": True})
        next(iter(pool.up())).attempts.copy().pop().take_away("died")
        assert [text_of(reply) for reply in await asked] == [reply_to(f"{n}") for n in range(8)]


async def test_a_port_that_is_closed_gets_nothing_new_while_its_streams_flow(live: Live) -> None:
    engine, refusing = queued(tokens_per_second=20), False

    async def closed(scope: Scope, receive: Receive, send: Send) -> None:
        if refusing and scope["type"] == "http":
            raise ConnectionResetError("its port is closed")
        await engine(scope, receive, send)

    async with pool_of(live(closed)) as pool:
        asked = asyncio.create_task(read(pool, asking(max_tokens=60)))
        await until(lambda: engine.running == 1)
        refusing = True
        await until(lambda: not pool.up())
        for _ in range(20):
            await asyncio.sleep(0.05)
            assert not pool.up()
        refusing = False
        assert text_of(await asked) == reply_to(tokens=60)
        await until(lambda: bool(pool.up()))
    assert engine.resumed == 0
