"""Which replica a request goes to."""

from collections import Counter
from typing import Any

import pytest

from synthia_vllm.cluster.replica import Replica
from synthia_vllm.cluster.routing import Router, affinity_key
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.call import Call, attach


def replicas(*busy: int) -> list[Replica]:
    return [Replica(f"r{n}", f"http://r{n}", state="up", in_flight=in_flight) for n, in_flight in enumerate(busy)]


def scope(user: str = "alice", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    found: dict[str, Any] = {"type": "http", "headers": pairs}
    attach(found, Call(id="1", request_id="1", route="/", account=Account(user)))
    return found


def chat(*contents: str) -> dict[str, Any]:
    roles = ["system", *["user", "assistant"] * len(contents)]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    keys = {affinity_key(scope(), chat("be brief", "hi", *more)) for more in ([], ["hello", "and?"])}
    assert len(keys) == 1
    assert keys != {affinity_key(scope(), chat("be brief", "ho"))}
    assert keys != {affinity_key(scope("bob"), chat("be brief", "hi"))}


def test_a_session_id_comes_before_the_text() -> None:
    key = affinity_key(scope(x_session_id="s1"), chat("a", "b"))
    assert key == affinity_key(scope(x_session_id="s1"), chat("c", "d"))
    assert key != affinity_key(scope(x_session_id="s2"), chat("a", "b"))


@pytest.mark.parametrize(
    "request_", [{"prompt": "text"}, {"prompt": [1, 2]}, {"input": "text"}, {"system": "s", "messages": []}]
)
def test_other_apis_have_a_key_too(request_: dict[str, Any]) -> None:
    assert affinity_key(scope(), request_)


def test_without_a_text_there_is_no_key() -> None:
    assert affinity_key(scope(), {}) is None
    assert affinity_key(scope(), None) is None


def test_one_key_stays_on_one_replica_and_many_spread() -> None:
    router, all_of_them = Router("affinity", 1.25), replicas(0, 0, 0, 0)
    picked = [router.pick(all_of_them, f"key {n}") for n in range(400)]
    assert picked == [router.pick(all_of_them, f"key {n}") for n in range(400)]
    assert min(Counter(picked).values()) > 50


def test_a_replica_that_goes_moves_only_its_own_conversations() -> None:
    router, all_of_them = Router("affinity", 1.25), replicas(0, 0, 0, 0)
    before = {n: router.pick(all_of_them, f"key {n}") for n in range(200)}
    after = {n: router.pick(all_of_them[:3], f"key {n}") for n in range(200)}
    assert all(after[n] is before[n] for n in before if before[n] is not all_of_them[3])


def test_a_conversation_leaves_a_replica_that_is_much_busier() -> None:
    router = Router("affinity", 1.25)
    home = router.pick(replicas(0, 0), "key")
    assert home is not None
    number = int(home.name[1])
    busy = [8, 8]
    assert router.pick(replicas(*busy), "key").name == home.name  # type: ignore[union-attr]
    busy[number] = 30
    assert router.pick(replicas(*busy), "key").name != home.name  # type: ignore[union-attr]


def test_without_a_key_the_least_busy_takes_it_and_equals_take_turns() -> None:
    router = Router("affinity", 1.25)
    assert router.pick(replicas(3, 1, 2), None).name == "r1"  # type: ignore[union-attr]
    idle = replicas(0, 0, 0)
    assert {router.pick(idle, None).name for _ in range(3)} == {"r0", "r1", "r2"}  # type: ignore[union-attr]


def test_round_robin_does_not_look_at_keys() -> None:
    router, all_of_them = Router("round_robin", 1.25), replicas(5, 0, 0)
    assert Counter(router.pick(all_of_them, "key").name for _ in range(6)) == {"r0": 2, "r1": 2, "r2": 2}  # type: ignore[union-attr]
    assert router.pick([], "key") is None
