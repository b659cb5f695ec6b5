"""The soak's own parts: what it calls growth, which tokens it misses, what its users make of an answer, its stores."""

import asyncio
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from click.testing import CliRunner
from starlette.types import Receive, Scope, Send

from benchmarks.soak import main, missed
from benchmarks.soak_bill import Row, Tokens, compare
from benchmarks.soak_house import House
from benchmarks.soak_stores import Store, postgres_in, redis_in, running
from benchmarks.soak_users import (
    CHAT,
    KINDS,
    MESSAGES,
    RESPONSES,
    Act,
    Client,
    Users,
    half,
    kind_of,
    leave,
    name_of,
    not_read,
    read,
    refused,
    slow,
)
from benchmarks.soak_watch import GENERATED, PROMPT, Server, Watch, fds_at_rest, leases, trend, until_at_rest
from synthia_vllm.gateway.accounts import USER_NAME, UserLimits
from synthia_vllm.gateway.limits.shared import SharedLimiter
from tests.gateway.live import serving
from tests.services import missing

# Growth


def test_a_slope_is_found_in_noise() -> None:
    hours = [at / 360 for at in range(270)]
    noise = random.Random(3)
    trends = [trend(hours, [500 + 7 * at + noise.gauss(0, 1) for at in hours]) for _ in range(100)]
    assert sum(abs(slope - 7) <= margin < 2 for slope, margin in trends) >= 90


def test_what_rises_and_falls_again_and_again_does_not_grow() -> None:
    hours = [at / 360 for at in range(270)]
    slope, margin = trend(hours, [500 + 20 * math.sin(at * 150) for at in hours])
    assert abs(slope) <= margin


def test_of_too_few_samples_no_slope_is_told() -> None:
    assert math.isnan(trend([0.0, 0.1], [1.0, 2.0])[0])


def test_memory_and_files_of_a_process_are_watched() -> None:
    watch = Watch({"this": os.getpid()})
    for _ in range(20):
        watch.look()
    figures = watch.figures()["this"]
    assert len(figures["anonymous, twelfths"]) == 12
    assert 0 < figures["anonymous, twelfths"][0] <= figures["rss, twelfths"][0]


def test_files_that_stay_open_are_counted(tmp_path: Path) -> None:
    before = fds_at_rest(os.getpid(), (), 1)
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        assert fds_at_rest(os.getpid(), (), 1) == before + 2


# The bill

ID = "0123456789abcdef"
OTHER = "fedcba9876543210"


def billed(prompt: int, generated: int, user: str = "a", name: str = ID) -> Row:
    return Row(name, name, user, prompt, generated, "finished")


def computed(prompt: int, generated: int, name: str = ID) -> Row:
    return Row(f"{name}-ffff", name, "anonymous", prompt, generated, "finished")


def bill(ledger: list[Row], engines: list[Row], counted: Tokens) -> dict[str, Any]:
    return compare(ledger, engines, counted, lambda user: user).figures()


def test_a_bill_that_is_the_engines_count_has_no_difference() -> None:
    canary = computed(1, 1, "c" * 16)
    found = bill([billed(7, 20)], [computed(7, 20), canary], Tokens(8, 21))
    assert found["generated: counted, not accounted for"] == found["prompt: counted, not accounted for"] == 0
    assert found["canaries"] == {"requests": 1, "prompt": 1, "generated": 1}
    assert found["differences by kind"] == {}


def test_a_prompt_of_several_replies_is_billed_once() -> None:
    found = bill([billed(7, 30)], [computed(7, 10, f"{ID}-{at}") for at in range(3)], Tokens(21, 30))
    assert found["prompt: counted, not accounted for"] == 0
    assert found["prompts computed again for n > 1"] == 14


def test_who_leaves_before_the_first_token_pays_a_prompt_that_the_engine_does_not_count() -> None:
    found = bill([billed(7, 0)], [computed(7, 0)], Tokens(0, 0))
    assert found["prompt: counted, not accounted for"] == 0
    assert found["prompts of those who left before the first token"] == 7


def test_a_token_that_nobody_pays_is_told_with_its_kind() -> None:
    ledger = [billed(7, 20, "leaves"), billed(5, 5, "stays", OTHER)]
    found = bill(ledger, [computed(7, 21), computed(5, 5, OTHER)], Tokens(12, 26))
    assert found["generated: counted, not accounted for"] == 1
    assert found["differences by kind"] == {"leaves": {"requests": 1, "generated": 1, "prompt": 0}}
    assert found["examples"][0]["engine"] == [[7, 21, "finished"]]
    assert found["billed by kind"]["stays"] == {"requests": 1, "prompt": 5, "generated": 5}


def test_a_token_that_was_never_generated_is_told_too() -> None:
    assert bill([billed(7, 21)], [computed(7, 20)], Tokens(7, 20))["generated: counted, not accounted for"] == -1


def test_a_row_that_is_missing_in_the_bill_is_told() -> None:
    found = bill([], [computed(7, 20)], Tokens(7, 20))
    assert found["requests that only the engine's ledger has"] == 1
    assert found["generated: counted, not accounted for"] == 20


# Promises


def kept() -> dict[str, Any]:
    memory = {"anonymous, an hour": 0.4, "anonymous, an hour, 95 %": 0.3, "fds at rest": [20, 20]}
    return {
        "minutes": 60.0,
        "processes": {"gateway": memory},
        "not at rest": {},
        "places of a user that may have some at once": {"with Redis": "4 times 200"},
        "unexpected answers": {},
        "rows given up": 0.0,
        "bill": {
            "generated: counted, not accounted for": 0,
            "prompt: counted, not accounted for": 0,
            "requests that only the engine's ledger has": 0,
            "writers without an end": 0,
            "differences by kind": {},
        },
    }


def test_promises_that_are_kept() -> None:
    assert missed(kept()) == []


@pytest.mark.parametrize(
    ("where", "what", "told"),
    [
        (("processes", "gateway", "anonymous, an hour"), 1.2, "memory: gateway"),
        (("processes", "gateway", "anonymous, an hour"), None, "memory: gateway"),
        (("processes", "gateway", "fds at rest"), [20, 29], "files: gateway"),
        (("not at rest", "gateway"), {"queued_tokens": 4}, "counters: gateway"),
        (("places of a user that may have some at once", "with Redis"), "3 times 200, 1 times 429", "counters: with"),
        (("unexpected answers", "chat: 500"), 2, "answers: 2 times chat: 500"),
        (("rows given up",), 3.0, "bill: 3 rows"),
        (("bill", "generated: counted, not accounted for"), -1, "bill: -1 generated"),
        (("bill", "writers without an end"), 1, "bill: 1 writers"),
        (("bill", "differences by kind", "chat"), {"requests": 2, "generated": 0}, "bill: 2 requests of 'chat'"),
    ],
)
def test_a_promise_that_is_missed_is_told(where: tuple[str, ...], what: Any, told: str) -> None:
    found: Any = kept()
    inner = found
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = what
    assert [one[: len(told)] for one in missed(found)] == [told]


def test_a_short_run_says_nothing_of_memory() -> None:
    found = kept() | {"minutes": 4.0}
    found["processes"]["gateway"]["anonymous, an hour"] = 30.0
    assert missed(found) == []


# Users


class StandIn:
    """Answers everything alike, and keeps what was asked. `status` None: it never answers."""

    def __init__(self, status: int | None = 200, body: bytes = b"{}") -> None:
        self.bodies: list[bytes] = []
        self.left = 0
        self._status, self._body = status, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        if self._status is None:
            await receive()
            self.left += 1
            return
        length = [(b"content-length", str(len(self._body)).encode())]
        await send({"type": "http.response.start", "status": self._status, "headers": length})
        await send({"type": "http.response.body", "body": self._body})


async def answers(app: StandIn, act: Act) -> list[str]:
    with serving(app) as port:
        url = f"http://127.0.0.1:{port}"
        async with Users(url, {}).session() as session:
            return await act(Client(url, "key", session, random.Random(1)))


@pytest.mark.parametrize(
    ("api", "said", "found"),
    [
        (CHAT, b"data: {}\n\ndata: [DONE]\n\n", "200"),
        (CHAT, b"data: {}\n\n", "broken"),
        (CHAT, b'data: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n', "broken"),
        (RESPONSES, b"event: response.created\ndata: {}\n\nevent: response.completed\ndata: {}\n\n", "200"),
        (RESPONSES, b"event: response.created\ndata: {}\n\n", "broken"),
        (MESSAGES, b"event: message_stop\ndata: {}\n\n", "200"),
    ],
)
async def test_a_stream_is_whole_with_its_end(api: str, said: bytes, found: str) -> None:
    assert await answers(StandIn(body=said), lambda client: read(client, api, stream=True)) == [found]


async def test_a_refusal_is_told_by_its_status() -> None:
    assert await answers(StandIn(503), read) == ["503"]


async def test_a_slow_user_sends_his_whole_request() -> None:
    app = StandIn()
    assert await answers(app, slow) == ["200"]
    assert json.loads(app.bodies[0])["messages"]


@pytest.mark.parametrize("act", [half, not_read, lambda client: leave(client, stream=False)])
async def test_who_leaves_has_left(act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        await sleep(min(seconds, 0.1))

    sleep = asyncio.sleep
    monkeypatch.setattr("benchmarks.soak_users.asyncio.sleep", at_once)
    assert await answers(StandIn(None), act) == ["left"]


async def test_a_refusal_with_another_status_is_not_as_it_should_be() -> None:
    assert (await answers(StandIn(418), refused))[0].startswith("418 for 4")


async def test_answers_that_a_kind_may_not_get_are_unexpected() -> None:
    users = Users("", {})
    users.answers = {
        "chat, whole": Counter({"200": 5, "503": 2, "500": 1}),
        "is refused": Counter({"refused": 3, "503 for 400": 1, "200 for 400": 1}),
        "capped": Counter({"429": 4}),
    }
    assert users.unexpected() == {"chat, whole: 500": 1, "is refused: 200 for 400": 1}


async def test_users_end_what_they_are_at_when_it_is_over() -> None:
    app, stop = StandIn(body=b"data: [DONE]\n\n"), asyncio.Event()
    with serving(app) as port:
        kind = "chat, streamed"
        keys = {name_of(kind, number): "key" for number in range(KINDS[kind].users)}
        users = Users(f"http://127.0.0.1:{port}", keys, (kind,))
        running = asyncio.create_task(users.run(stop))
        while len(app.bodies) < 9:
            await asyncio.sleep(0.01)
        stop.set()
        await running
    assert users.answers == {kind: Counter({"200": len(app.bodies)})}


@pytest.mark.parametrize("kind", list(KINDS))
def test_users_have_names_that_tell_their_kind(kind: str) -> None:
    assert re.fullmatch(USER_NAME, name_of(kind, 3))
    assert kind_of(name_of(kind, 3)) == kind


# Counters


class Counting:
    """A gateway that tells so many requests in flight for a while, and then none."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        busy = int(self.times > 0)
        if scope["path"] == "/metrics":
            said = f'# HELP x y\nsynthia_requests_in_flight{{user="a b"}} {busy}\nvllm:num_requests_running 0.0\n'
        else:
            self.times -= 1
            state = dict.fromkeys(("queued_requests", "queued_tokens", "in_flight_tokens"), 0)
            said = json.dumps({**state, "in_flight_requests": busy, "users": {"a b": {}} if busy else {}})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said.encode()})


async def test_what_is_not_at_rest_is_told_and_what_comes_to_rest_is_not(redis_url: str) -> None:
    with serving(Counting(3)) as soon, serving(Counting(10**6)) as never:
        resting, busy = (Server(f"http://127.0.0.1:{port}", "key") for port in (soon, never))
        assert await asyncio.to_thread(until_at_rest, resting, resting, redis_url, 30) == {}
        left = await asyncio.to_thread(until_at_rest, resting, busy, redis_url, 1)
    told = {"synthia_requests_in_flight": 1.0, "in_flight_requests": 1, "users": ["a b"]}
    assert left == {"gateway": told}


async def test_requests_that_run_by_the_shared_limits_are_counted(redis_url: str) -> None:
    limiter = SharedLimiter(redis_url, timeout=30.0)
    await limiter.reserve("a", UserLimits(concurrent_requests=2), "call", 10)
    assert await asyncio.to_thread(leases, redis_url) == 1
    await limiter.settle("a", "call", 10)
    assert await asyncio.to_thread(leases, redis_url) == 0
    await limiter.close()


# All together


async def test_under_load_every_fault_that_begins_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def faults(postgres: Any, redis: Any) -> list[Any]:
        each = ("redis", "postgres", "redis again", "postgres again")
        return [(one, partial(told.append, one), 0.05, partial(told.append, f"no {one}")) for one in each]

    monkeypatch.setattr("benchmarks.soak_house.faults", faults)
    app, stop, stores = StandIn(), asyncio.Event(), cast(Any, None)
    with serving(app) as port:
        server = Server(f"http://127.0.0.1:{port}", "key")
        keys = {name_of("chat, whole", number): "key" for number in range(2)}
        here = House(server, server, {"this": os.getpid()}, keys, stores, stores, lambda _: None)
        users = Users(server.url, keys, ("chat, whole",))
        running = asyncio.create_task(here.load(users, 600, 0.05, stop))
        while here.happened.total() < 5:
            await asyncio.sleep(0.01)
        stop.set()  # as Ctrl-C does
        watch = await running
    assert told[:4] == ["redis", "no redis", "postgres", "no postgres"]
    assert len(told) % 2 == 0
    assert users.answers["chat, whole"] == Counter({"200": len(app.bodies)})
    assert watch.looks["this"]


async def test_a_watched_process_that_has_gone_ends_the_load() -> None:
    app, stores = StandIn(), cast(Any, None)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    with serving(app) as port:
        server = Server(f"http://127.0.0.1:{port}", "key")
        here = House(server, server, {"gone": process.pid}, {}, stores, stores, lambda _: None)
        with pytest.raises(psutil.NoSuchProcess):
            await here.load(Users(server.url, {}, ()), 600, None, asyncio.Event())


@pytest.mark.parametrize(("generated", "code"), [(20, 0), (21, 1)])
def test_the_command_writes_its_figures_and_fails_where_it_missed_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generated: int, code: int
) -> None:
    postgres, redis, server = SimpleNamespace(url="bill"), SimpleNamespace(url=""), SimpleNamespace()
    counters = iter([{PROMPT: 5.0, GENERATED: 2.0}, {PROMPT: 12.0, GENERATED: 2.0 + generated}])
    server.sums = lambda: next(counters)
    found = {name: value for name, value in kept().items() if name != "bill"}

    async def soak(*_: Any) -> dict[str, Any]:
        return found

    rows = {"bill": [billed(7, 20)], "engine": [computed(7, generated)]}
    for name, stand_in in {
        "stores": lambda folder: nullcontext((postgres, redis)),
        "engine": lambda folder: nullcontext((server, 1, "engine")),
        "house": lambda *_: nullcontext(None),
        "soak": soak,
        "rows": rows.__getitem__,
        "gaps": lambda url: 0,
        "_SETTLE_S": 0.0,
    }.items():
        monkeypatch.setattr(f"benchmarks.soak.{name}", stand_in)
    output = tmp_path / "soak.json"
    assert CliRunner().invoke(main, ["--minutes", "1", "--output", str(output)]).exit_code == code
    report = json.loads(output.read_text())
    assert report["options"]["minutes"] == 1
    assert report["bill"]["engine's counters"] == {"prompt": 7, "generated": generated}
    assert bool(report["missed"]) == code


# Stores


@pytest.fixture(params=[postgres_in, redis_in], ids=["postgres", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    binary = "redis-server" if request.param is redis_in else "postgres"
    if shutil.which(binary) is None and not list(Path("/usr/lib/postgresql").glob(f"*/bin/{binary}")):
        missing(f"{binary} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="synthia-soak-"))  # not pytest's: another user can't enter that
    folder.chmod(0o711)
    try:
        with running(request.param(folder / "store")) as found:
            yield found
    finally:
        shutil.rmtree(folder)


def test_a_store_goes_and_comes_back_where_it_was(store: Store) -> None:
    assert store.answers(store)
    store.stop()
    assert not store.answers(store)
    store.start()
    assert store.answers(store)


def test_a_store_that_stands_still_answers_nobody_and_goes_on(store: Store) -> None:
    store.pause()
    try:
        assert not store.answers(store)
    finally:
        store.go_on()
    assert store.answers(store)


def test_a_store_is_in_a_group_of_its_own(store: Store) -> None:
    assert store.process is not None
    assert os.getpgid(store.process.pid) != os.getpgid(0)
