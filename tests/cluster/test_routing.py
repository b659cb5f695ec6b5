"""Which replica a request goes to."""

from collections import Counter
from typing import Any

import pytest

from synthia_vllm.cluster.replica import Replica
from synthia_vllm.cluster.routing import Affinity, Router, affinity_of
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
    def key(user: str, *contents: str) -> bytes:
        found = affinity_of(scope(user), chat(*contents))
        assert found is not None
        return found.key

    assert key("alice", "be brief", "hi") == key("alice", "be brief", "hi", "hello", "and?")
    assert key("alice", "be brief", "hi") != key("alice", "be brief", "ho")
    assert key("alice", "be brief", "hi") != key("bob", "be brief", "hi")


def test_a_session_id_comes_before_the_text() -> None:
    key = affinity_of(scope(x_session_id="s1"), chat("a", "b"))
    assert key == affinity_of(scope(x_session_id="s1"), chat("c", "d"))
    assert key != affinity_of(scope(x_session_id="s2"), chat("a", "b"))


@pytest.mark.parametrize(
    "request_", [{"prompt": "text"}, {"prompt": [1, 2]}, {"input": "text"}, {"system": "s", "messages": []}]
)
def test_other_apis_have_a_key_too(request_: dict[str, Any]) -> None:
    assert affinity_of(scope(), request_)


def test_without_a_text_there_is_no_key() -> None:
    assert affinity_of(scope(), {}) is None
    assert affinity_of(scope(), None) is None


def new(key: str) -> Affinity:
    return Affinity(key.encode(), continued=False)


def continued(key: str) -> Affinity:
    return Affinity(key.encode(), continued=True)


def test_a_later_turn_is_known_as_one() -> None:
    assert affinity_of(scope(), chat("a", "b")).continued is False  # type: ignore[union-attr]
    assert affinity_of(scope(), chat("a", "b", "c", "d")).continued is True  # type: ignore[union-attr]


def test_new_conversations_go_where_there_is_least_to_do_and_stay_there() -> None:
    router, all_of_them = Router("affinity", 1.5), replicas(3, 1, 2, 5)
    assert router.pick(all_of_them, new("a")).name == "r1"  # type: ignore[union-attr]
    all_of_them[1].in_flight = 4
    assert router.pick(all_of_them, continued("a")).name == "r1"  # type: ignore[union-attr]
    assert router.pick(all_of_them, new("b")).name == "r2"  # type: ignore[union-attr]


def test_conversations_of_other_gateways_are_found_at_one_replica_and_spread() -> None:
    all_of_them = replicas(0, 0, 0, 0)
    one, other = Router("affinity", 1.5), Router("affinity", 1.5)
    picked = [one.pick(all_of_them, continued(f"key {n}")) for n in range(400)]
    assert picked == [other.pick(all_of_them, continued(f"key {n}")) for n in range(400)]
    assert min(Counter(picked).values()) > 50


def test_a_replica_that_goes_moves_only_its_own_conversations() -> None:
    all_of_them = replicas(0, 0, 0, 0)
    before = {n: Router("affinity", 1.5).pick(all_of_them, continued(f"key {n}")) for n in range(200)}
    after = {n: Router("affinity", 1.5).pick(all_of_them[:3], continued(f"key {n}")) for n in range(200)}
    assert all(after[n] is before[n] for n in before if before[n] is not all_of_them[3])


def test_a_conversation_leaves_a_replica_that_is_much_busier_and_stays_away() -> None:
    router, both = Router("affinity", 1.5), replicas(8, 8)
    home = router.pick(both, new("key"))
    assert home is not None
    assert router.pick(both, continued("key")) is home
    home.in_flight = 40
    other = router.pick(both, continued("key"))
    assert other is not home
    home.in_flight = 8
    assert router.pick(both, continued("key")) is other


def test_without_a_key_the_least_busy_takes_it_and_equals_take_turns() -> None:
    router = Router("affinity", 1.5)
    assert router.pick(replicas(3, 1, 2), None).name == "r1"  # type: ignore[union-attr]
    idle = replicas(0, 0, 0)
    assert {router.pick(idle, None).name for _ in range(3)} == {"r0", "r1", "r2"}  # type: ignore[union-attr]


def test_round_robin_does_not_look_at_keys() -> None:
    router, all_of_them = Router("round_robin", 1.5), replicas(5, 0, 0)
    assert Counter(router.pick(all_of_them, new("key")).name for _ in range(6)) == {"r0": 2, "r1": 2, "r2": 2}  # type: ignore[union-attr]
    assert router.pick([], new("key")) is None
