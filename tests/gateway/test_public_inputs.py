"""What clients can send to a whole gateway: each kind of input that a gateway was found to fail on, by name."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.limits.base import Standing
from tests.gateway.live import serving
from tests.gateway.whole import (
    BODIES,
    CHAT,
    COMPLETIONS,
    GENERATING,
    LENGTH,
    MESSAGES,
    RESPONSES,
    House,
    house,
    house_settings,
)

STREAMED = [pytest.param(True, id="streamed"), pytest.param(False, id="whole")]


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as found:
        yield found


@pytest.fixture(params=["memory", "redis"])
async def limited(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    """The same, its limits counted in the process or in a real Redis."""
    redis = request.getfixturevalue("redis_url") if request.param == "redis" else None
    async with house(tmp_path, limits={"redis": redis}) as found:
        yield found


async def still_answers(home: House, user: str = "bob") -> None:
    """Another user's requests are answered, and nothing is left of what was before."""
    await home.rest()
    for path in GENERATING:
        assert (await home.post(user, path)).status == 200
    assert (await home.get(user, "/ready")).status == 200


def param_of(path: str, told: Any) -> str:
    """The field that an error names; Anthropic's form has no place for it but the text."""
    return str(told["error"]["message"] if path.startswith(MESSAGES) else told["error"]["param"])


# Numbers


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize(
    "number", ["1" + "0" * 309, "1e309", "1" + "0" * 18, "-" + "1" * 400, "9223372036854775808", "0.5", "-1", "-0.0"]
)
async def test_a_length_of_1e309_is_refused_and_others_notice_nothing(limited: House, path: str, number: str) -> None:
    field = LENGTH[path]
    body = json.dumps({**BODIES[path], field: 0}).replace(f'"{field}": 0', f'"{field}": {number}').encode()
    for user in ("alice", "bob"):
        told = await limited.post(user, path, body)
        assert told.status == 400
        # An exponent beyond all numbers is no JSON that can be read: then nothing knows which field it was.
        assert ("body" if number == "1e309" else field) in param_of(path, told.json())
    assert (await limited.standing("bob")).tokens_last_minute == 0
    assert not limited.engine.seen
    await still_answers(limited)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *((path, LENGTH[path], value) for path in GENERATING for value in ("4000", 4000.5, 4000.0, True, [4000], {})),
        *((path, "n", value) for path in (CHAT, COMPLETIONS) for value in ("8", 8.0, True, 0, -1, 129, 10**30)),
        *((path, "stream", value) for path in GENERATING for value in ("true", "false", 1, 0, [])),
        *((path, "temperature", value) for path in GENERATING for value in ("1", True, -1, 3, 1e308)),
        *((path, "top_k", value) for path in GENERATING for value in ("1", 1.5, 10**30)),
        *((path, "seed", value) for path in (CHAT, COMPLETIONS) for value in ("1", 1.5, 2**63, -(2**63) - 1)),
        *((path, "min_tokens", value) for path in (CHAT, COMPLETIONS) for value in ("1", -1, 10**18)),
        (CHAT, "max_completion_tokens", "4000"),
        (CHAT, "logprobs", 1),
        (CHAT, "top_logprobs", "5"),
        (CHAT, "stop", 5),
        (CHAT, "stop", ["x"] * 1000),
        (CHAT, "stop", "x" * 1_000_000),
        (COMPLETIONS, "logprobs", True),
        (COMPLETIONS, "echo", "true"),
        (COMPLETIONS, "prompt", [1, "a"]),
        (COMPLETIONS, "prompt", [[1.5]]),
        (COMPLETIONS, "prompt", [-1]),
        (COMPLETIONS, "prompt", [10**30]),
        (MESSAGES, "stop_sequences", "x"),
        (RESPONSES, "input", 5),
        (CHAT, "model", 5),
    ],
)
async def test_a_value_of_another_type_or_out_of_bounds_names_its_field(
    home: House, path: str, field: str, value: Any
) -> None:
    told = await home.post("alice", path, {**BODIES[path], field: value})
    assert told.status == 400
    assert field in param_of(path, told.json())
    assert not home.engine.seen


async def test_a_stream_is_billed_in_full_whatever_its_interval(home: House) -> None:
    for path in (CHAT, COMPLETIONS):
        body = {**BODIES[path], "max_tokens": 200, "stream": True, "stream_interval": 50}
        assert (await home.post("bob", path, body)).status == 200
    assert home.billed("bob")[1] == home.engine.generated == 400


async def test_replies_are_counted_in_full(home: House) -> None:
    home.let_in("small", tokens_per_minute=1000)
    told = await home.post("small", COMPLETIONS, {**BODIES[COMPLETIONS], "n": 128, "max_tokens": 100})
    assert told.status == 400
    assert "never" in told.json()["error"]["message"]
    body = {"prompt": [[5]] * 8, "n": 10, "max_tokens": 10, "model": "synthia"}
    assert (await home.post("small", COMPLETIONS, body)).status == 200
    assert (await home.standing("small")).tokens_last_minute == 8 + 800
    assert home.billed("small") == (8, 800)


@pytest.mark.parametrize("prompt", ["[5]", '"a"', "[5,6]", '""'])
async def test_a_million_prompts_are_refused(home: House, prompt: str) -> None:
    body = b'{"prompt":[' + b",".join([prompt.encode()] * (4_000_000 // (len(prompt) + 1))) + b"]}"
    told = await home.post("bob", COMPLETIONS, body)
    assert told.status == 400
    assert told.json()["error"]["param"].startswith(("prompt", "body"))
    assert not home.engine.seen
    await still_answers(home)


# Lengths and limits


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("words", [5, 7500])
async def test_a_request_without_a_length_is_asked_once_and_counted_once(limited: House, path: str, words: int) -> None:
    limited.let_in("once", requests_per_minute=1, tokens_per_minute=10_000)
    limited.engine.reply_tokens = 10
    body = json.loads(json.dumps(BODIES[path]).replace("Hello", "x" * words))
    del body[LENGTH[path]]
    assert (await limited.post("once", path, body)).status == 200
    assert len(limited.engine.seen) == 1
    (row,) = limited.bill("once")
    assert row.generated_tokens == 11  # the end is a token too
    assert row.prompt_tokens == len(limited.engine.seen[0].prompt) > words
    used = row.prompt_tokens + row.generated_tokens
    standing = await limited.standing("once")
    assert (standing.requests_last_minute, standing.tokens_last_minute) == (1, used)
    assert (await limited.post("once", path, body)).status == 429


@pytest.mark.parametrize("path", GENERATING)
async def test_a_prompt_that_is_too_long_is_refused_before_anything_is_counted(limited: House, path: str) -> None:
    body = json.loads(json.dumps(BODIES[path]).replace("Hello", "x" * 9000))
    told = await limited.post("bob", path, body)
    assert told.status == 400
    assert "8192" in told.json()["error"]["message"]
    assert not limited.engine.seen
    assert await limited.standing("bob") == Standing()


@pytest.mark.parametrize("streamed", STREAMED)
@pytest.mark.parametrize("status", [400, 502, 503, 504])
async def test_what_the_engine_refuses_leaves_nothing_reserved_and_nothing_billed(
    limited: House, status: int, streamed: bool
) -> None:
    limited.engine.faults.change({"status": status})
    for path in GENERATING:
        for _ in range(10):
            told = await limited.post("bob", path, {**BODIES[path], "stream": streamed})
            assert told.status == status
    standing = await limited.standing("bob")
    assert (standing.tokens_last_minute, standing.concurrent_requests, standing.tokens_this_month) == (0, 0, 0)
    assert limited.billed("bob") == (0, 0)
    outcome = {row.outcome for row in limited.bill("bob")}
    assert outcome == {"rejected" if status == 400 else "failed"}
    limited.engine.faults.change({"status": None})
    await still_answers(limited)


async def leaving(home: House, user: str, path: str, body: dict[str, Any]) -> None:
    """Asks, and leaves once the engine has generated something."""
    leave = asyncio.Event()
    before = home.engine.generated
    task = asyncio.create_task(home.post(user, path, body, leave=leave))
    async with asyncio.timeout(10):
        while home.engine.generated == before:
            await asyncio.sleep(0.005)
    leave.set()
    assert not (await task).whole
    await home.rest()


@pytest.mark.parametrize("streamed", STREAMED)
async def test_all_prompts_of_a_request_that_is_cut_are_billed(tmp_path: Path, streamed: bool) -> None:
    async with house(tmp_path, NullEnginePort(tokens_per_second=50)) as home:
        body = {"prompt": [[5] * 1000] * 100, "max_tokens": 1000, "stream": streamed}
        await leaving(home, "bob", COMPLETIONS, body)
        (row,) = home.bill("bob")
        assert (row.outcome, row.prompt_tokens) == ("cancelled", 100_000)
        assert row.generated_tokens == home.engine.generated > 0
        standing = await home.standing("bob")
        assert standing.tokens_last_minute == 100_000 + home.engine.generated


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("streamed", STREAMED)
async def test_what_a_client_leaves_is_billed_and_charged_to_it(tmp_path: Path, path: str, streamed: bool) -> None:
    async with house(tmp_path, NullEnginePort(tokens_per_second=100)) as home:
        body = {**BODIES[path], LENGTH[path]: 1000, "stream": streamed}
        scheduler = home.gateway.scheduler
        other = asyncio.create_task(home.post("bob", path, body))  # keeps bob's counter alive
        await asyncio.sleep(0)
        before = scheduler.counters.service.get("bob", 0.0)
        await leaving_one(home, "bob", path, body)
        charged = scheduler.counters.service["bob"] - before
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        await home.rest()
        cut = next(row for row in home.bill("bob") if row.outcome == "cancelled")
        assert cut.generated_tokens > 0
        assert charged >= cut.prompt_tokens + 2 * cut.generated_tokens
        assert home.billed("bob")[1] == home.engine.generated
        standing = await home.standing("bob")
        assert standing.tokens_last_minute == sum(home.billed("bob"))


async def leaving_one(home: House, user: str, path: str, body: dict[str, Any]) -> None:
    """As `leaving`, with another request of the user under way."""
    leave = asyncio.Event()
    task = asyncio.create_task(home.post(user, path, body, leave=leave))
    async with asyncio.timeout(10):
        while home.engine.generated < 6:
            await asyncio.sleep(0.005)
    leave.set()
    assert not (await task).whole


# Bodies


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("depth", [70, 700, 100_000])
async def test_content_that_is_nested_deep_is_refused_on_every_route(home: House, path: str, depth: int) -> None:
    field = next(name for name in ("messages", "prompt", "input", "tokens") if name in BODIES[path])
    for deep in (nested(depth), "[" * depth + "]" * depth):
        wrong = json.dumps({**BODIES[path], field: None}).replace("null", deep)
        assert (await home.post("alice", path, wrong.encode())).status == 400
    if field == "messages":
        content = [{"role": "user", "content": None}]
        wrong = json.dumps({**BODIES[path], "messages": content}).replace("null", nested(depth))
        assert (await home.post("alice", path, wrong.encode())).status == 400
    await still_answers(home)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("depth", [60, 700, 100_000])
async def test_a_field_that_nobody_knows_may_be_anything(home: House, path: str, depth: int) -> None:
    odd = json.dumps({**BODIES[path], "unknown": None}).replace("null", nested(depth))
    assert (await home.post("alice", path, odd.encode())).status in (200, 400)
    await still_answers(home)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b'{"model": NaN}', b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 10**5],
    ids=lambda body: body[:12].decode("latin-1"),
)
async def test_a_body_that_is_no_json_object_is_refused(home: House, path: str, body: bytes) -> None:
    told = await home.post("alice", path, body)
    assert told.status == 400
    assert told.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
async def test_text_that_no_database_takes_is_no_harm(home: House, path: str) -> None:
    for model in ("a\0b", "x" * 1000, "\U0001f600", "'; DROP TABLE ledger; --"):
        assert (await home.post("bob", path, {**BODIES[path], "model": model})).status == 404
    await still_answers(home)
    assert home.bill("bob")


# Models and keys


async def test_models_are_told_to_those_with_a_key_and_only_their_own(home: House) -> None:
    home.let_in("small", models=["synthia"])
    assert (await home.get("nobody", "/v1/models")).status == 401
    assert (await home.get("nobody", "/v1/models/synthia")).status == 401
    assert (await home.get("nobody", "/v1/models/none")).status == 401
    listed = [one["id"] for one in (await home.get("small", "/v1/models")).json()["data"]]
    assert listed == ["synthia"]
    assert (await home.get("small", "/v1/models/synthia")).json()["id"] == "synthia"
    assert (await home.get("small", "/v1/models/null")).status == 404
    listed = [one["id"] for one in (await home.get("alice", "/v1/models")).json()["data"]]
    assert listed == ["null", "synthia", "synthia-tot"]
    for name in listed:
        assert (await home.get("alice", f"/v1/models/{name}")).json()["root"] == "null"
    unknown = await home.get("alice", "/v1/models/none")
    assert (unknown.status, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_models_of_a_sick_engine_are_its_error(home: House) -> None:
    home.engine.faults.change({"dead": True})
    for path in ("/v1/models", "/v1/models/synthia"):
        assert (await home.get("alice", path)).status == 502
        assert (await home.get("nobody", path)).status == 401
    for path in BODIES:
        assert (await home.post("alice", path)).status == 502


# Streams that break, and clients that do not read


@pytest.mark.parametrize("path", GENERATING)
async def test_an_engine_that_breaks_in_a_stream_is_told_once_in_the_apis_form(home: House, path: str) -> None:
    home.engine.faults.change({"break_after": 4})
    told = await home.post("bob", path, {**BODIES[path], "stream": True, LENGTH[path]: 50})
    assert (told.status, told.whole) == (200, True)
    events = told.events()
    errors = [event for event in events if "error" in event or event.get("type") in ("error", "response.failed")]
    assert errors
    assert errors[-1] == events[-1]
    if path == MESSAGES:
        assert errors == [events[-1]]
        assert events[-1]["type"] == "error"
        assert events[-1]["error"]["type"] == "api_error"
        assert b"message_stop" not in told.body
    elif path == RESPONSES:
        assert b"response.completed" not in told.body
    else:
        assert errors == [events[-1]]
        assert events[-1]["error"]["code"] == "upstream_lost"
    (row,) = home.bill("bob")
    assert (row.outcome, row.reason, row.status) == ("failed", "upstream_lost", 200)
    assert row.generated_tokens == home.engine.generated == 3
    assert sum(home.billed("bob")) == (await home.standing("bob")).tokens_last_minute
    home.engine.faults.change({"break_after": None})
    await still_answers(home, "alice")


@pytest.mark.parametrize("path", GENERATING)
async def test_an_engine_that_breaks_in_a_whole_reply_is_502_and_its_tokens_are_billed(home: House, path: str) -> None:
    home.engine.faults.change({"break_after": 4})
    told = await home.post("bob", path, {**BODIES[path], LENGTH[path]: 50})
    assert told.status == 502
    (row,) = home.bill("bob")
    assert (row.outcome, row.generated_tokens) == ("failed", 3)


def test_a_client_that_does_not_read_holds_no_place_in_the_engine(tmp_path: Path) -> None:
    import socket

    from synthia_vllm.gateway.app import Gateway

    engine = NullEnginePort(context=100_000)
    settings = house_settings(tmp_path)
    gateway = Gateway(engine, settings, capacity=Capacity(requests=1))
    key = gateway.keys.create("alice")[1]

    def request(tokens: int) -> bytes:
        body = json.dumps({**BODIES[CHAT], "max_tokens": tokens, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    with serving(gateway.app, beside=gateway) as port, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(request(60_000))  # 10 MB and more, which no socket's buffers hold
        deadline = time.monotonic() + 30
        while engine.finished < 1:
            assert time.monotonic() < deadline, engine.generated
            time.sleep(0.05)
        with socket.create_connection(("127.0.0.1", port), 10) as other:
            other.sendall(request(5))
            other.settimeout(10)
            found = b""
            while b"data: [DONE]" not in found:
                part = other.recv(65536)
                assert part
                found += part
        assert engine.running == 0
        # It reads on, and has it all.
        deaf.settimeout(30)
        tail = b""
        while b"data: [DONE]" not in tail:
            part = deaf.recv(2**20)
            assert part
            tail = tail[-100:] + part


# Errors have the form of the API that was asked


def is_anthropics(told: Any, kind: str) -> bool:
    return told["type"] == "error" and told["error"]["type"] == kind and bool(told["error"]["message"])


@pytest.mark.parametrize("path", [MESSAGES, "/v1/messages/count_tokens"])
async def test_errors_of_anthropics_routes_have_anthropics_form(tmp_path: Path, path: str) -> None:
    async with house(tmp_path, max_body_bytes=5000) as home:
        home.let_in("small", models=["synthia"])
        good = BODIES[path]

        async def told(user: str, body: Any) -> tuple[int, Any]:
            answer = await home.post(user, path, body)
            assert answer.json()["request_id"] == answer.headers[b"x-request-id"].decode()
            return answer.status, answer.json()

        for user, body, status, kind in (
            ("nobody", good, 401, "authentication_error"),
            ("small", {**good, "model": "synthia-tot"}, 403, "permission_error"),
            ("alice", {**good, "model": "none"}, 404, "not_found_error"),
            ("alice", {**good, "messages": 5}, 400, "invalid_request_error"),
            ("alice", b"{", 400, "invalid_request_error"),
            ("alice", b"x" * 6000, 413, "request_too_large"),
        ):
            found, error = await told(user, body)
            assert found == status
            assert is_anthropics(error, kind), error
        unknown = await home.get("alice", path)
        assert unknown.status == 405
        assert unknown.headers[b"allow"]
        assert is_anthropics(unknown.json(), "invalid_request_error")


@pytest.mark.parametrize("path", GENERATING)
async def test_limits_and_overload_are_told_in_the_apis_form(tmp_path: Path, path: str) -> None:
    engine = NullEnginePort()
    async with house(tmp_path, engine, capacity=Capacity(requests=1), fair={"max_queued_requests": 1}) as home:
        home.let_in("once", requests_per_minute=1)
        await home.post("once", path)
        limit = await home.post("once", path)
        assert limit.status == 429
        assert 1 <= int(limit.headers[b"retry-after"]) <= 60
        engine.faults.change({"hang": True})
        waiting = [asyncio.create_task(home.post("bob", path)) for _ in range(2)]
        await asyncio.sleep(0.05)
        full = await home.post("alice", path)
        assert full.status == 503
        assert full.headers[b"retry-after"]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        engine.faults.change({"hang": False, "status": 502})
        lost = await home.post("alice", path)
        assert lost.status == 502
        if path == MESSAGES:
            kinds = ("rate_limit_error", "overloaded_error", "api_error")
            for answer, kind in zip((limit, full, lost), kinds, strict=True):
                assert is_anthropics(answer.json(), kind)
        else:
            codes = ("rate_limit_exceeded", "overloaded", "upstream_lost")
            for answer, code in zip((limit, full, lost), codes, strict=True):
                assert answer.json()["error"]["code"] == code


async def test_time_in_the_queue_is_over_in_the_apis_form(tmp_path: Path) -> None:
    engine = NullEnginePort()
    engine.faults.change({"hang": True})
    async with house(tmp_path, engine, capacity=Capacity(requests=1)) as home:
        running = asyncio.create_task(home.post("bob", CHAT))
        await asyncio.sleep(0.05)
        late = await home.post("alice", MESSAGES, headers={"x-queue-timeout-s": "0.05"})
        assert late.status == 503
        assert is_anthropics(late.json(), "overloaded_error")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
