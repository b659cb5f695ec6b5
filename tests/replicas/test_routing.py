"""Which replica a request goes to."""

from collections import Counter

from synthia_vllm.engine.port import Affinity
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.health import Health
from synthia_vllm.replicas.replica import Replica
from synthia_vllm.replicas.routing import Router


def replicas(*busy: int) -> list[Replica]:
    return [
        Replica(f"r{n}", Endpoint(f"http://r{n}"), Health(10.0, 0.0), state="up", in_flight=one)
        for n, one in enumerate(busy)
    ]


def new(key: str, following: str | None = None) -> Affinity:
    return Affinity(key.encode(), continued=False, next=following.encode() if following else None)


def continued(key: str) -> Affinity:
    return Affinity(key.encode(), continued=True)


def test_new_conversations_go_where_there_is_least_to_do_and_stay_there() -> None:
    router, all_of_them = Router("affinity", 1.5), replicas(3, 1, 2, 5)
    assert router.pick(all_of_them, new("a")).name == "r1"  # type: ignore[union-attr]
    all_of_them[1].in_flight = 4
    assert router.pick(all_of_them, continued("a")).name == "r1"  # type: ignore[union-attr]
    assert router.pick(all_of_them, new("b")).name == "r2"  # type: ignore[union-attr]


def test_a_conversation_is_remembered_by_the_key_that_its_next_request_has() -> None:
    router, all_of_them = Router("affinity", 1.5), replicas(3, 1, 2, 5)
    assert router.pick(all_of_them, new("a", following="b")).name == "r1"  # type: ignore[union-attr]
    all_of_them[1].in_flight = 4
    assert router.pick(all_of_them, continued("b")).name == "r1"  # type: ignore[union-attr]


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
