"""Busy is not hung: what an engine's counters say, on a clock of our own."""

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from synthia_vllm.replicas.attempt import Attempt
from synthia_vllm.replicas.budget import RetryBudget
from synthia_vllm.replicas.counters import Counters, ask_counters, read_counters
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.health import Health
from synthia_vllm.replicas.replica import Replica
from tests.replicas.engines import Live

PATIENCE = 10.0
PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 9000.0
vllm:generation_tokens_total{engine="0",model_name="m"} 77.0
vllm:request_prompt_tokens_sum{engine="0",model_name="m"} 2000.0
vllm:request_prefill_time_seconds_sum{engine="0",model_name="m"} 4.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
synthia_max_num_seqs{engine="0"} 64.0
synthia_max_num_batched_tokens{engine="0"} 2048.0
"""


def replica(*prompts: int, tells: bool = True) -> Replica:
    """With requests that wait for their first byte."""
    found = Replica("r", Endpoint("http://r", vllm=True), Health(PATIENCE, 0.0), state="up")
    if tells:
        found.health.told(Counters(0, (0.0,)), 0.0)
    for tokens in prompts:
        found.attempts.add(Attempt(None, found.endpoint, {}, prompt_tokens=tokens))  # type: ignore[arg-type]
    return found


def test_the_counters_of_a_page() -> None:
    assert read_counters(PAGE) == Counters(5, (77.0, 9000.0, 0.25), 500.0, 1600, 64, 2048)
    second = PAGE.replace('engine="0"', 'engine="1"')
    assert read_counters(PAGE + second) == Counters(10, (154.0, 18000.0, 0.5), 500.0, 3200, 128, 4096)


@pytest.mark.parametrize("page", ["", "{}", "<html>", "vllm:num_requests_running 1", PAGE.replace("77.0", "many")])
def test_a_page_that_tells_nothing(page: str) -> None:
    assert read_counters(page) is None


@given(st.text())
def test_any_page_is_read(page: str) -> None:
    read_counters(page)
    read_counters(PAGE + page)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (PlainTextResponse(PAGE), read_counters(PAGE)),
        (PlainTextResponse(PAGE, 500), None),
        (PlainTextResponse(PAGE + "vllm:num_requests_running nan"), None),
        (PlainTextResponse(PAGE + "#" * 2**24), None),  # more than is read of any
    ],
)
async def test_a_page_of_no_use_is_none(live: Live, answer: Response, told: Counters | None) -> None:
    async with aiohttp.ClientSession() as session:
        engine = Starlette(routes=[Route("/metrics", lambda request: answer)])
        assert await ask_counters(live(engine), session, {}) == told


def test_a_replica_without_work_never_hangs() -> None:
    found = replica()
    for now in range(0, 1000, 5):
        assert not found.stands_still(float(now))
    found.attempts.update(replica(5).attempts)  # and work is counted from when it came
    assert not found.stands_still(999.0)


def test_a_queue_that_moves_is_no_hang_however_long_it_takes() -> None:
    found = replica(*[2000] * 60)
    for now in range(0, 500, 5):
        found.health.told(Counters(60, (float(now),)), float(now))
        assert not found.stands_still(now + 4.9)


def test_a_prompt_that_fills_the_cache_is_progress() -> None:
    found = replica(100_000)
    for chunk in range(1, 50):
        found.health.told(Counters(1, (0.0, 0.0, chunk / 100)), chunk * 9.0)
        assert not found.stands_still(chunk * 9.0 + 8.9)


def test_work_without_progress_is_a_hang_whatever_it_answers() -> None:
    found = replica()
    for now in range(10):
        found.health.told(Counters(4, (7.0,)), float(now))
    found.attempts.update(replica(0, 0, 0, 0).attempts)
    assert not found.stands_still(PATIENCE - 0.1)
    assert found.stands_still(PATIENCE + 0.1)


@pytest.mark.parametrize(
    ("prompts", "counters", "seconds"),
    [
        ([500], Counters(1, (0.0,)), 5.0),  # 100 tokens a second, until it has told more
        ([500], Counters(1, (0.0,), prefill_rate=1000.0), 1.0),  # half of what it did before
        ([8000, 8000], Counters(2, (0.0,)), 81.92),  # a step has no more than 8,192 tokens
        ([8000, 8000], Counters(2, (0.0,), step_tokens=2048), 20.48),  # or as it tells
        ([10], Counters(9, (0.0,)), 81.92),  # others ask it as well, and for what is not known
    ],
)
def test_the_deadline_grows_with_the_prompts_in_front(prompts: list[int], counters: Counters, seconds: float) -> None:
    found = replica(*prompts)
    found.health.told(counters._replace(progress=(0.0,)), 0.0)
    assert not found.stands_still(PATIENCE + seconds - 0.1)
    assert found.stands_still(PATIENCE + seconds + 0.1)


def test_an_engine_that_tells_nothing_is_judged_by_its_replies() -> None:
    found = replica(0, tells=False)
    found.health.heard(8.0)
    assert not found.stands_still(8.0 + PATIENCE)
    assert found.stands_still(8.1 + PATIENCE)


def test_counters_that_lie_do_not_take_a_replica_out_that_answers() -> None:
    found = replica(0)
    for now in range(1, 100):
        found.health.told(Counters(1, (0.0,)), float(now))
        found.health.heard(float(now))
        assert not found.stands_still(now + 0.5)


def test_a_reply_that_waits_for_its_reader_is_no_work() -> None:
    found = replica(5)
    for attempt in found.attempts:
        attempt.begun = True
    assert not found.stands_still(1000.0)


def test_time_in_which_the_gateway_stood_still_does_not_count() -> None:
    found = replica(0)
    found.health.forgive(100.0)
    assert not found.stands_still(100.0 + PATIENCE)


def test_what_is_asked_again_stays_within_the_budget() -> None:
    now = 0.0
    budget = RetryBudget(lambda: now)
    assert [budget.delay(320) for _ in range(320)] == [0.0] * 320  # all of a lost replica at once
    delays = [budget.delay(320) for _ in range(320)]
    assert max(delays) > 1
    assert all(0 <= delay <= 10 for delay in delays)
    now = 100.0
    assert budget.delay(0) == 0.0
