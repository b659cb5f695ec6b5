"""The property of `tests/gateway/test_property.py` on the real engine: bill, limits, engine and told usage agree.

One user sends made-up requests of all four APIs side by side, and leaves some of them; another asks for the same plain
reply meanwhile. The engine's own count is vLLM's `generation_tokens` counter.
"""

import asyncio
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import Session

from synthia_vllm.gateway.store.tables import Entry
from tests.conftest import RunningServer
from tests.e2e.test_users import synthia
from tests.gateway.bodies import FIELDS, bodies, schema, stops, texts, tokens
from tests.gateway.whole import BODIES, CHAT, COMPLETIONS, GENERATING, LENGTH, MESSAGES, RESPONSES

pytestmark = pytest.mark.e2e

EXAMPLES = int(os.environ.get("SYNTHIA_ENGINE_EXAMPLES", "20"))  # of several requests each
LONGEST = 12  # tokens, where the length is good
MOST_SEQUENCES = 12  # of a request: prompts times n
GIVEN_UP = "by this grammar or schema, with the request's other options"
PATIENCE_S = 60.0  # of clients that do not leave
USER, OTHER = "various", "plain"
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes long, with an engine
)

# What a real engine does with little work, and does at all, is likelier here than before the stand-in.
real_stops = st.sampled_from([" the", "e", "\n", "ing", "."])
good_schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "min_tokens": st.integers(0, 2),
    "stop": st.one_of(real_stops, st.lists(real_stops, max_size=3), stops),
    "stream_interval": st.one_of(st.integers(1, 5), st.just(100)),
    "structured_outputs": st.one_of(
        st.sampled_from([{"regex": "[0-9]{3}"}, {"choice": ["yes", "no"]}, {"json": good_schema}]),
        st.fixed_dictionaries({}, optional={"json": schema, "regex": texts, "choice": st.just(["a"])}),
    ),
}
OPENAI = {
    **SAMPLING,
    "n": st.integers(1, 4),
    "response_format": st.one_of(
        st.just({"type": "json_schema", "json_schema": {"name": "a", "schema": good_schema}}),
        st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": schema}),
    ),
    "stream_options": st.just({"include_usage": True}),
}
prompts = st.one_of(
    texts,
    st.lists(texts, max_size=3),
    st.lists(tokens, max_size=100),
    st.lists(st.lists(tokens, min_size=1, max_size=5), max_size=3),
    st.sampled_from([300, 4096, 9000]).map(lambda length: [5] * length),
)
CHANGED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    CHAT: {**OPENAI, "max_completion_tokens": st.integers(1, LONGEST)},
    COMPLETIONS: {**OPENAI, "prompt": prompts},
    RESPONSES: SAMPLING,
    MESSAGES: SAMPLING,
}


@dataclass(frozen=True)
class Asked:
    """A request, and when its client leaves: after so many pieces, a silence of so many seconds, or never."""

    path: str
    body: bytes
    pieces: int | None
    silence: float | None


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    path = draw(st.sampled_from(GENERATING))
    body = draw(bodies(path, {**FIELDS[path], **CHANGED[path]}, LONGEST))
    leaves = draw(st.sampled_from(["never", "never", "never", "pieces", "silence"]))
    if leaves == "never" and _may_be_long(path, body):
        return Asked(path, body, 6, 1.0)
    return Asked(
        path,
        body,
        draw(st.integers(1, 6)) if leaves == "pieces" else None,
        draw(st.sampled_from([0.001, 0.01, 0.05, 0.2])) if leaves == "silence" else None,
    )


def _may_be_long(path: str, body: bytes) -> bool:
    """Whether its length is another than those that are good here, if it has one at all."""
    try:
        length = json.loads(body).get(LENGTH[path])
    except ValueError:
        return False
    return length not in range(1, LONGEST + 1)


@dataclass
class Answer:
    status: int = 0
    body: bytes = b""
    whole: bool = False

    def objects(self) -> list[dict[str, Any]]:
        """Its events' data, or the reply as the only one."""
        if not self.body.startswith((b"data:", b"event:", b":")):
            return [json.loads(self.body)]
        lines = [line[len(b"data:") :].strip() for line in self.body.split(b"\n") if line.startswith(b"data:")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    def told(self) -> tuple[int, int] | None:
        """Tokens of prompt and reply, if the client is told."""
        found: dict[str, Any] = {}
        for one in self.objects():
            inner = one.get("response") or one.get("message") or one
            found |= inner.get("usage") or {}
        if "prompt_tokens" in found:
            return found["prompt_tokens"], found["completion_tokens"]
        if "input_tokens" in found:  # Anthropic's leave out what was in the cache
            return found["input_tokens"] + found.get("cache_read_input_tokens", 0), found["output_tokens"]
        return None

    def text(self) -> str:
        return str(self.objects()[0]["choices"][0]["message"]["content"])


@dataclass
class Page:
    """What /metrics tells of the two users, and of the engine."""

    requests: float
    prompt: float
    generated: float
    engine: float
    at_rest: bool


@dataclass(repr=False)
class Home:
    """The shared server with users of our own."""

    server: RunningServer
    ledger: Engine
    keys: dict[str, str] = field(default_factory=dict)
    undisturbed: str = ""
    sent: int = 0
    ids: Iterator[int] = field(default_factory=itertools.count)

    def headers(self, user: str, name: str = "") -> dict[str, str]:
        self.sent += 1
        return {
            "x-api-key": self.keys[user],
            "content-type": "application/json",
            **({"x-request-id": name} if name else {}),
        }

    def rows(self, names: list[str]) -> dict[str, Entry]:
        with Session(self.ledger, expire_on_commit=False) as session:
            return {row.request_id: row for row in session.scalars(select(Entry).where(Entry.request_id.in_(names)))}

    def billed(self, user: str) -> int:
        total = func.coalesce(func.sum(Entry.prompt_tokens + Entry.generated_tokens), 0)
        with Session(self.ledger) as session:
            return int(session.scalar(select(total).where(Entry.user == user)) or 0)

    async def page(self, http: httpx.AsyncClient) -> Page:
        text = (await http.get("/metrics")).text

        def total(name: str, label: str = "") -> float:
            return sum(map(float, re.findall(rf"^{name}(?:\{{[^}}\n]*{label}[^\n]*\}})? (\S+)", text, re.MULTILINE)))

        ours = f'user="(?:{USER}|{OTHER})"'
        return Page(
            total("synthia_requests_total", ours),
            total("synthia_prompt_tokens_total", ours),
            total("synthia_generation_tokens_total", ours),
            total("vllm:generation_tokens_total"),
            not total("synthia_ledger_waiting_rows") and not total("vllm:num_requests_running"),
        )

    async def rest(self, http: httpx.AsyncClient) -> Page:
        """The page when all that was sent has ended and is on the bill."""
        deadline = time.monotonic() + 60
        while True:
            page = await self.page(http)
            if page.at_rest and page.requests == self.sent:
                return page
            assert time.monotonic() < deadline, (page, self.sent)
            await asyncio.sleep(0.05)

    async def ask(self, http: httpx.AsyncClient, one: Asked, name: str) -> Answer:
        answer = Answer()
        headers = self.headers(USER, name)
        waits = httpx.Timeout(60, read=one.silence or PATIENCE_S)
        try:
            async with http.stream("POST", one.path, content=one.body, headers=headers, timeout=waits) as reply:
                answer.status = reply.status_code
                pieces = 0
                async for piece in reply.aiter_raw():
                    answer.body += piece
                    pieces += 1
                    if pieces == one.pieces:
                        return answer
        except httpx.ReadTimeout:
            return answer
        answer.whole = True
        return answer

    async def plain(self, http: httpx.AsyncClient, name: str = "") -> Answer:
        """The other user's request."""
        body = {**BODIES[CHAT], "temperature": 0, "max_tokens": 8}
        reply = await http.post(CHAT, json=body, headers=self.headers(OTHER, name))
        return Answer(reply.status_code, reply.content, whole=True)

    async def settled(self, http: httpx.AsyncClient) -> int:
        """Tokens that the user's limits hold for settled: told while it has something under way, less that."""
        most = 4000  # it is still under way when the state is asked for, on any machine
        body = {"model": "synthia", "prompt": [5], "max_tokens": most, "ignore_eos": True, "stream": True}
        async with http.stream("POST", COMPLETIONS, json=body, headers=self.headers(USER)) as reply:
            pieces = reply.aiter_raw()  # kept: httpx closes the stream when it goes
            await anext(pieces)
            state = (await http.get("/admin/state", headers={"x-api-key": self.keys["admin"]})).json()
        return int(state["users"][USER]["used"]["tokens_this_month"]) - (1 + most)


@pytest.fixture(scope="module")
def home(server: RunningServer) -> Iterator[Home]:
    found = Home(server, create_engine(f"sqlite:///{server.data}/synthia.db"))
    found.keys["admin"] = synthia(server.data, "keys", "create", "--user", "counting", "--admin")
    limits = ("--tokens-per-month", str(10**12), "--tokens-per-minute", str(10**9))
    for user in (USER, OTHER):
        found.keys[user] = synthia(server.data, "keys", "create", "--user", user, *limits)

    async def first() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            found.undisturbed = (await found.plain(http)).text()

    asyncio.run(first())
    yield found
    found.ledger.dispose()


async def check(home: Home, requests: list[Asked]) -> list[str]:
    """Runs one example; returns what came of its requests."""
    async with httpx.AsyncClient(base_url=home.server.url, timeout=120) as http:
        before = await home.rest(http)
        names = [f"{USER}-{next(home.ids)}" for _ in requests]
        mine = [home.ask(http, one, name) for one, name in zip(requests, names, strict=True)]
        *answers, other = await asyncio.gather(*mine, home.plain(http, other_name := f"{OTHER}-{next(home.ids)}"))
        after = await home.rest(http)
        rows = home.rows([*names, other_name])
        billed = home.billed(USER)
        settled = await home.settled(http)

    for one, name, answer in zip(requests, names, answers, strict=True):
        assert answer.status < 500, (one, answer.body)
        if not answer.whole:
            continue
        row = rows.get(name)
        if answer.status >= 400:
            assert answer.objects()[0]["error"]["message"]
            assert row is None or row.prompt_tokens == row.generated_tokens == 0, one
            continue
        assert row is not None
        errors = [told["error"] for told in answer.objects() if told.get("error")]
        assert all(GIVEN_UP in error["message"] for error in errors), (one, answer.body)
        assert answer.told() in (None, (row.prompt_tokens, row.generated_tokens)), one

    generated = sum(row.generated_tokens for row in rows.values())
    prompt = sum(row.prompt_tokens for row in rows.values())
    # A sequence whose grammar is left without a token is refused: what it came to is vLLM's count, and nobody's bill.
    unbilled = sum(GIVEN_UP in answer.body.decode() for answer in answers) * MOST_SEQUENCES * LONGEST
    assert 0 <= after.engine - before.engine - generated <= unbilled, requests
    assert (after.prompt - before.prompt, after.generated - before.generated) == (prompt, generated)
    assert settled == billed
    assert (other.status, other.text()) == (200, home.undisturbed)
    assert other.told() == (rows[other_name].prompt_tokens, rows[other_name].generated_tokens)
    return [str(answer.status) if answer.whole else "left" for answer in answers]


def cut_in_an_interval(path: str) -> list[Asked]:
    """A stream that is to be told in large pieces, and whose client may leave before the second one."""
    body = {**BODIES[path], LENGTH[path]: 1000, "ignore_eos": True, "stream": True, "stream_interval": 1000}
    return [Asked(path, json.dumps(body).encode(), 2, 4.0)]


@quick
@given(requests=st.lists(asked(), min_size=2, max_size=8))
@example(requests=cut_in_an_interval(CHAT))
def test_bill_limits_and_engine_agree_and_another_user_notices_nothing(home: Home, requests: list[Asked]) -> None:
    for outcome in asyncio.run(check(home, requests)):
        event(outcome)
