"""What `benchmarks.disruptions` counts: lost replies are lost, late ones late, and a gateway's states are read."""

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest
from starlette.types import Receive, Scope, Send

from benchmarks.disruption_load import Clients, Reply, Request, figures, why_failed
from benchmarks.disruption_watch import Sample, Watch, look
from benchmarks.disruptions import shortcomings
from tests.gateway.live import serving

WHOLE, STREAMED = Request(4), Request(4, streamed=True)


class StandIn:
    """Answers completions as told: with so many tokens, a status, or an end in the middle."""

    def __init__(self, tokens: int = 4, status: int = 200, cut: bool = False, states: str = "") -> None:
        self.prompts: list[str] = []
        self._tokens, self._status, self._cut, self._states = tokens, status, cut, states

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/v1/completions":
            return await answer(send, self._status, self._states.encode())
        body = json.loads((await receive())["body"])
        self.prompts.append(body["prompt"])
        whole = {
            "choices": [{"text": " a" * self._tokens, "finish_reason": "length"}],
            "usage": {"completion_tokens": self._tokens},
        }
        said = json.dumps(whole).encode()
        if body["stream"]:
            said = b"data: " + said + b"\n\ndata: [DONE]\n\n"
        return await answer(send, self._status, said, more=5 if self._cut else 0)


async def answer(send: Send, status: int, body: bytes, more: int = 0) -> None:
    """`more` bytes are announced that never come."""
    length = str(len(body) + more).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body, "more_body": bool(more)})


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def replies(app: Any, *requests: Request) -> list[Reply]:
    async def ask() -> list[Reply]:
        async with Clients(url(port)) as clients:
            return await clients.at_once(requests)

    with serving(app) as port:
        return asyncio.run(ask())


def test_whole_and_streamed_replies_with_all_their_tokens_are_none_lost() -> None:
    found = figures(replies(StandIn(), WHOLE, STREAMED))
    assert (found["replies"], found["failed"], found["reasons"]) == (2, 0, {})
    assert set(found["median_s"]) == {"whole", "streamed"}


@pytest.mark.parametrize(
    ("app", "reason"),
    [(StandIn(tokens=3), "3 tokens"), (StandIn(status=502), "502"), (StandIn(cut=True), "ClientPayloadError")],
)
def test_what_is_short_refused_or_cut_is_lost(app: StandIn, reason: str) -> None:
    found = figures(replies(app, WHOLE, STREAMED))
    assert found["failed"] == 2
    assert all(reason in told for told in found["reasons"])


def test_an_end_that_was_not_asked_for_is_a_loss() -> None:
    assert why_failed(WHOLE, ("text", "length", 4)) is None
    assert why_failed(WHOLE, ("text", "stop", 4)) is not None
    assert why_failed(WHOLE, ("", None, None)) is not None


def test_no_prompt_begins_as_another_one() -> None:
    app = StandIn()
    replies(app, *[Request(4, long=True)] * 3)
    assert len({prompt.split()[0] for prompt in app.prompts}) == 3


async def test_a_closed_loop_ends_with_every_reply_it_asked_for() -> None:
    app, enough = StandIn(), asyncio.Event()
    with serving(app) as port:
        async with Clients(url(port)) as clients:
            running = asyncio.create_task(clients.closed_loop([WHOLE, STREAMED], enough))
            while len(app.prompts) < 6:
                await asyncio.sleep(0.01)
            enough.set()
            found = await running
    assert len(found) == len(app.prompts)
    assert figures(found)["failed"] == 0


async def test_a_gateway_s_readiness_and_states_are_read() -> None:
    page = 'synthia_replicas{state="up"} 1\nsynthia_replicas{state="out"} 1\nsynthia_replicas{state="draining"} 0\n'
    with serving(StandIn(status=503, states=page)) as port:
        async with aiohttp.ClientSession() as session:
            sample = await look(session, url(port))
    assert (sample.ready, sample.states) == (503, {"up": 1, "out": 1})


async def test_one_that_does_not_answer_is_not_ready() -> None:
    async with aiohttp.ClientSession() as session:
        sample = await look(session, "http://127.0.0.1:1")
    assert (sample.ready, sample.states) == (0, {})


def test_out_is_timed_from_the_stop_and_what_was_out_before_does_not_count() -> None:
    stop = time.monotonic()
    watch = Watch(["a", "b", "c"])
    watch.samples["a"] = [Sample(stop - 1, 200, {"up": 2}), Sample(stop + 9, 503, {"up": 1, "out": 1})]
    watch.samples["b"] = [Sample(stop - 1, 200, {"up": 1, "out": 1}), Sample(stop + 9, 200, {"up": 1, "out": 1})]
    watch.samples["c"] = [Sample(stop - 1, 200, {"up": 2}), Sample(stop + 1, 0, {})]
    assert watch.out_after(stop) == {"a": 9.0, "b": None, "c": None}
    told = watch.figures()["a"]
    assert (told["samples"], told["ready"], told["with one out"]) == (2, {"200": 1, "503": 1}, 1)


def test_what_is_lost_late_or_out_is_told() -> None:
    fine: dict[str, Any] = {
        "failed": 0,
        "late": 0,
        "gateways": {"a": {"with one out": 0, "samples": 9, "ready": {"200": 9}}},
    }
    assert shortcomings({"overload": {"with canaries": [fine], "with canaries / without": 0.99}}) == []
    assert shortcomings({"deaths": {"whole replies": [fine, {**fine, "late": 1}, {**fine, "failed": 2}]}}) == [
        "deaths, whole replies: 1 late",
        "deaths, whole replies: 2 failed",
    ]
    out = {**fine, "gateways": {"a": {"with one out": 3, "samples": 9, "ready": {"200": 8, "503": 1}}}}
    told = shortcomings({"overload": {"with canaries": [out], "with canaries / without": 0.9}})
    assert [any(word in line for line in told) for word in ("out in 3", "not ready in 1", "0.9")] == [True] * 3
