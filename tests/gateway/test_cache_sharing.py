"""Who finds whose beginnings in the engine's prefix cache: by the salts that engines get."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Engine
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.app import Gateway, without_users
from synthia_vllm.gateway.cache_sharing import CacheSharing, group_of
from synthia_vllm.settings import Settings
from tests.gateway.asgi import Answer, post
from tests.gateway.live import serving
from tests.gateway.whole import BODIES, CHAT, COMPLETIONS, GENERATING, LENGTH, House, house, house_settings
from tests.replicas.engines import Answers, Live, WithoutTokensRoute, event, pool_of, streaming

CLIENTS = "the-clients-own-salt"
USERS = ("alice", "bob", "research:carol", "research:dave")
SECRETS = st.binary(min_size=1, max_size=64)
NAMES = st.text("ab:.@", min_size=1, max_size=4)
GIVEN = st.one_of(st.none(), st.text(min_size=1, max_size=8))
MODES = st.sampled_from(["all", "group", "user"])
# Fields with objects in them, where a client may put his salt as well.
OBJECTS: dict[str, Any] = {
    "stream_options": {"include_usage": True},
    "vllm_xargs": {"any": "thing"},
    "kv_transfer_params": {},
    "extra_body": {},
    "metadata": {},
    "prompt": {"prompt_token_ids": [5, 6]},
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "response_format": {"type": "text"},
    "structured_outputs": {"choice": ["a"]},
}


@pytest.fixture
def live() -> Iterator[Live]:
    """Serves an app as long as the test runs; its URL."""
    with ExitStack() as stack:
        yield lambda app: f"http://127.0.0.1:{stack.enter_context(serving(app))}"


@asynccontextmanager
async def home(folder: Path, engine: Any = None, **options: Any) -> AsyncIterator[House]:
    """A gateway with keys for `USERS`."""
    async with house(folder, engine, **options) as found:
        for user in USERS:
            found.let_in(user)
        yield found


async def salts(found: House, user: str, path: str = CHAT, **fields: Any) -> list[str | None]:
    """What the sequences of one request of a user's are salted with."""
    found.engine.seen.clear()
    assert (await found.post(user, path, {**BODIES[path], **fields})).status == 200
    return [generation.salt for generation in found.engine.seen]


async def salt_by_user(found: House) -> dict[str, str | None]:
    return {user: salt for user in USERS for salt in await salts(found, user)}


def with_salts(value: Any, places: Iterator[bool]) -> Any:
    """The same with the client's salt in some of its objects."""
    if isinstance(value, list):
        return [with_salts(one, places) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: with_salts(one, places) for name, one in value.items()}
    return found | {"cache_salt": CLIENTS} if next(places, False) else found


@st.composite
def salted(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route, and a body with the client's salt at its top or further in."""
    path = draw(st.sampled_from(GENERATING))
    extra = draw(st.lists(st.sampled_from(sorted(OBJECTS)), unique=True, max_size=3))
    body = {**BODIES[path], **{name: OBJECTS[name] for name in extra}, "stream": draw(st.booleans())}
    if path in (CHAT, COMPLETIONS):
        body["n"] = draw(st.integers(1, 3))
    found = with_salts(body, iter(draw(st.lists(st.booleans(), max_size=12))))
    if draw(st.booleans()):
        found["cache_salt"] = draw(st.sampled_from([CLIENTS, CLIENTS, "", None, 5]))
    return path, json.dumps(found).encode()


@pytest.mark.parametrize("mode", ["all", "group", "user"])
def test_the_clients_own_salt_never_arrives(mode: str, tmp_path: Path) -> None:
    answered = set()

    async def send(path: str, body: bytes) -> None:
        async with home(tmp_path, prompt={"cache_sharing": mode}) as found:
            headers = {"cache-salt": CLIENTS, "x-cache-salt": CLIENTS}
            answer = await found.post("alice", path, body, headers=headers)
            assert answer.status in (200, 400)
            assert CLIENTS not in repr(list(found.engine.seen))
            assert {generation.salt for generation in found.engine.seen} <= right
            if answer.status == 200:
                answered.add(path)

    sharing = CacheSharing(mode, b"x" * 32)  # type: ignore[arg-type]
    right = {sharing.salt(Account("alice"), own) for own in (None, CLIENTS)}

    @given(salted())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def at_every_place(asked: tuple[str, bytes]) -> None:
        asyncio.run(send(*asked))

    at_every_place()
    assert answered == set(GENERATING)


async def test_a_salt_among_vllms_extra_arguments_is_refused(tmp_path: Path) -> None:
    async with home(tmp_path) as found:
        answer = await found.post("alice", CHAT, {**BODIES[CHAT], "vllm_xargs": {"cache_salt": CLIENTS}})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "vllm_xargs")


@pytest.mark.parametrize("path", GENERATING)
async def test_one_who_runs_the_engine_for_himself_salts_nothing(path: str) -> None:
    engine = NullEnginePort()
    answer = await post(without_users(engine, Settings()), {**BODIES[path], "cache_salt": CLIENTS}, path=path)
    assert (answer.status, [generation.salt for generation in engine.seen]) == (200, [None])


async def test_the_same_user_has_the_same_salt_on_every_route(tmp_path: Path) -> None:
    async with home(tmp_path) as found:
        each = [salt for path in GENERATING for salt in await salts(found, "alice", path)]
        each += await salts(found, "alice", CHAT, n=3, seed=1)
        each += await salts(found, "alice", COMPLETIONS, prompt=["A", "B"], n=2)
    assert len(each) == 4 + 3 + 4
    assert len(set(each)) == 1


async def test_by_default_users_share_nothing(tmp_path: Path) -> None:
    async with home(tmp_path) as found:
        by_user = await salt_by_user(found)
    assert None not in by_user.values()
    assert len(set(by_user.values())) == len(USERS)


async def test_a_group_shares_and_others_do_not(tmp_path: Path) -> None:
    async with home(tmp_path, prompt={"cache_sharing": "group"}) as found:
        by_user = await salt_by_user(found)
    assert by_user["research:carol"] == by_user["research:dave"]
    assert len({by_user["research:carol"], by_user["alice"], by_user["bob"], None}) == 4


@pytest.mark.parametrize(
    ("user", "group"),
    [("research:alice", "research"), ("research:a:b", "research"), ("research", "research"), (":a", ":a"), ("a", "a")],
)
def test_a_group_is_what_a_name_has_before_its_colon(user: str, group: str) -> None:
    assert group_of(user) == group


async def test_all_share_where_that_is_set(tmp_path: Path) -> None:
    async with home(tmp_path, prompt={"cache_sharing": "all"}) as found:
        assert set((await salt_by_user(found)).values()) == {None}


async def test_who_has_no_key_shares_with_others_without(tmp_path: Path) -> None:
    access = {"mode": "open", "database": f"sqlite:///{tmp_path}/keys.db", "secret": "x"}
    async with home(tmp_path, access=access) as found:
        strangers = [*await salts(found, "nobody"), *await salts(found, "nobody else")]
        (alices,) = await salts(found, "alice")
    assert strangers == [strangers[0]] * 2
    assert alices not in strangers


@given(MODES, SECRETS, SECRETS, NAMES, NAMES, GIVEN, GIVEN)
def test_a_salt_cannot_be_guessed_without_the_secret(
    mode: Any, secret: bytes, other: bytes, user: str, whom: str, own: str | None, wanted: str | None
) -> None:
    """Whatever a client gives, by the secret that he knows or without: no salt but his own group's comes of it."""
    assume(secret != other)
    theirs = CacheSharing(mode, secret).salt(Account(whom), wanted)
    if theirs is not None:
        assert CacheSharing(mode, other).salt(Account(user), own) != theirs
        assert CacheSharing(mode, secret).salt(Account(user), theirs) != theirs
        assert len(bytes.fromhex(theirs)) == 32
        assert not {whom, wanted} & {theirs}


@given(MODES, NAMES, NAMES, GIVEN, GIVEN)
def test_what_a_client_gives_leads_to_nobody_elses_salt(
    mode: Any, user: str, whom: str, own: str | None, wanted: str | None
) -> None:
    sharing = CacheSharing(mode, b"secret")
    together = {"all": True, "group": group_of(user) == group_of(whom), "user": user == whom}[mode]
    same = sharing.salt(Account(user), own) == sharing.salt(Account(whom), wanted)
    assert same == (together and own == wanted)


def test_a_group_is_not_the_user_of_its_name() -> None:
    one, other = CacheSharing("user", b"secret"), CacheSharing("group", b"secret")
    assert one.salt(Account("research")) != other.salt(Account("research"))


async def test_two_gateways_with_one_secret_salt_alike(tmp_path: Path) -> None:
    other = {"mode": "keys", "database": f"sqlite:///{tmp_path}/other.db", "secret": "y" * 32}
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with home(folders[0]) as one, home(folders[1]) as two, home(tmp_path, access=other) as third:
        by_user = [await salt_by_user(found) for found in (one, two, third)]
    assert by_user[0] == by_user[1]
    assert not set(by_user[0].values()) & set(by_user[2].values())


# Engines elsewhere


def text_alone() -> Answers:
    """An engine that is not vLLM."""
    return Answers(streaming(event({"text": "Hi", "finish_reason": "stop"}), b"data: [DONE]\n\n"))


@asynccontextmanager
async def before(engine: Engine, folder: Path) -> AsyncIterator[Callable[..., Any]]:
    """Asks a gateway before this engine as alice."""
    async with Gateway(engine, house_settings(folder)) as gateway:
        key = gateway.keys.create("alice")[1]

        async def ask(path: str, **fields: Any) -> Answer:
            body = {**BODIES[path], "cache_salt": CLIENTS, **fields}
            return await post(gateway.app, body, path=path, headers={"x-api-key": key})

        yield ask


ALICES = CacheSharing("user", b"x" * 32).salt(Account("alice"), CLIENTS)


@pytest.mark.parametrize("by_ids", [True, False])
@pytest.mark.parametrize(
    ("make", "salt"),
    [
        pytest.param(NullEngine, ALICES, id="generate"),
        pytest.param(lambda: WithoutTokensRoute(NullEngine()), ALICES, id="completions"),
        pytest.param(lambda: NullEngine(generate_route=False), None, id="not vllm"),
        pytest.param(text_alone, None, id="text alone"),
    ],
)
async def test_an_engine_elsewhere_gets_the_gateways_salt_or_none(
    make: Callable[[], Any], salt: str | None, by_ids: bool, live: Live, tmp_path: Path
) -> None:
    engine = make()
    async with pool_of(live(engine), tokenizer=by_ids) as pool, before(pool, tmp_path) as ask:
        assert [(await ask(path)).status for path in GENERATING] == [200] * 4
    engine = engine.engine if isinstance(engine, WithoutTokensRoute) else engine
    bodies = list(engine.seen if isinstance(engine, Answers) else engine.asked)
    bodies = [body for body in bodies if body.get("prompt", body.get("token_ids")) != [1]]  # canaries
    assert [body.get("cache_salt") for body in bodies] == [salt] * 4
    assert CLIENTS not in repr(bodies)


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize(
    ("route", "extra"), [("generate", {}), ("generate", {"stream": True, "seed": 5}), ("completions", {})]
)
async def test_a_reply_that_goes_on_elsewhere_keeps_its_salt(
    extra: dict[str, Any], route: str, path: str, live: Live, tmp_path: Path
) -> None:
    engines = [NullEngine(faults=Faults(break_after=7)), NullEngine()]
    apps = engines if route == "generate" else [WithoutTokensRoute(engine) for engine in engines]
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(pool_of(*map(live, apps), routing="round_robin"))
        ask = await stack.enter_async_context(before(pool, tmp_path))
        statuses = [(await ask(path, **{LENGTH[path]: 12}, **extra)).status for _ in range(2)]
    assert statuses == [200, 200]
    asked = [body["cache_salt"] for engine in engines for body in engine.asked if body.get("cache_salt")]
    assert asked == [ALICES] * 3  # canaries have none


async def test_a_gateway_behind_a_gateway_keeps_its_users_apart(live: Live, tmp_path: Path) -> None:
    inner = {"mode": "open", "database": f"sqlite:///{tmp_path}/inner.db", "secret": "y"}
    async with AsyncExitStack() as stack:
        behind = await stack.enter_async_context(home(tmp_path, access=inner))
        pool = await stack.enter_async_context(pool_of(live(behind.gateway.app)))
        found = await stack.enter_async_context(home(tmp_path, pool))
        for user in ("alice", "bob", "alice"):
            assert (await found.post(user, CHAT)).status == 200
        seen = [generation for generation in behind.engine.seen if generation.prompt != [1]]  # no canaries
    first, other, again = [generation.salt for generation in seen]
    assert first == again
    assert len({first, other, None}) == 3
