"""A gateway's part of what the engines hold, where they are not counted together."""

from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.fair.peers import share


def test_gateways_divide_what_the_replicas_hold() -> None:
    assert share(Capacity(tokens=1000, requests=256, block=16), 2) == Capacity(tokens=500, requests=128, block=16)


def test_each_gateway_may_ask_for_something() -> None:
    assert share(Capacity(tokens=3, requests=1), 4) == Capacity(tokens=1, requests=1)


def test_what_no_replica_has_told_stays_unknown() -> None:
    assert share(Capacity(), 2) == Capacity()
