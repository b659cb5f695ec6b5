"""The speed scripts' own parts: what they start, what they ask, and that a held loop is seen."""

import asyncio
import json
import time

import pytest

from benchmarks import cost
from benchmarks.api_process import fields
from benchmarks.loop import TARGET_MS, Lateness, tick
from benchmarks.loop_cases import BODY, CONTEXT, Case, KnownPrompts, cases, null
from synthia_vllm.bench import ceiling
from synthia_vllm.prompt import STOP_STRINGS
from synthia_vllm.settings import Settings


def test_both_servers_are_asked_for_replies_of_one_length() -> None:
    demo = fields("demo", 100)
    assert demo["min_tokens"] == 100
    assert demo["stop"] == list(STOP_STRINGS)
    assert "max_tokens" not in demo
    assert fields("one-layer", 100)["ignore_eos"]


def test_no_layer_is_idle_while_its_cost_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ceiling._FULL.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.access.mode == "keys"
    assert settings.log.requests
    assert None not in settings.limits.model_dump(exclude={"redis"}).values()


def test_the_summary_of_costs_compares_within_rounds() -> None:
    results = {
        ceiling.RATES: {"bare": [100.0, 50.0], "stack": [50.0, 50.0]},
        ceiling.COST: {"stack": [10.0, 20.0]},
        ceiling.TTFT: {"bare": [1.0, 2.0], "stack": [2.0, 4.0]},
        ceiling.MEMORY: {"stack": [23.0]},
    }
    found = ceiling.summary(results)
    assert found["stack / bare"] == 0.75
    assert found["added to the median TTFT, ms"] == 1.5
    assert "| stack: KB a stream | 23.0 |" in cost.markdown({"summary": found})


async def test_a_held_loop_is_seen() -> None:
    late = Lateness()
    ticking = asyncio.create_task(tick(late, where=False))
    await asyncio.sleep(0.02)
    time.sleep(3 * TARGET_MS / 1000)  # noqa: ASYNC251  (that is what is to be seen)
    await asyncio.sleep(0.02)
    ticking.cancel()
    assert late.held >= 2 * TARGET_MS / 1000
    assert late.own < late.held  # it slept


@pytest.mark.parametrize("case", [case for case in cases() if "gzip" not in case.name], ids=lambda case: case.name)
def test_bodies_are_within_what_a_gateway_reads(case: Case) -> None:
    assert 0 < len(case.body()) <= Settings().max_body_bytes


def test_the_large_chat_is_as_large_as_it_may_be() -> None:
    case = next(case for case in cases() if case.name == "a chat of 4 MB")
    assert len(json.loads(case.body())["messages"][0]["content"]) > 0.99 * BODY


async def test_prompts_have_their_log_probabilities_in_full() -> None:
    from synthia_vllm.engine.port import Generation, Sampling

    generation = Generation(id="1", prompt=[1] * 100, sampling=Sampling(max_tokens=1, prompt_logprobs=20))
    (delta,) = [delta async for delta in KnownPrompts().generate(generation)]
    assert delta.prompt_logprobs is not None
    assert len(delta.prompt_logprobs) == 100
    assert null().context == CONTEXT
