"""How replicas divide a machine."""

import pytest

from synthia_vllm.cluster.cpus.share import share_of
from synthia_vllm.engine import hardware
from synthia_vllm.engine.hardware import GIB, physical_cores, usable_cpus
from synthia_vllm.settings import ClusterSettings, Settings
from tests.engine.test_memory import machine


def settings(cpus: float | None = None) -> Settings:
    return Settings(cluster=ClusterSettings(cpus_per_replica=cpus))


def test_one_replica_has_the_machine() -> None:
    share = share_of(machine(24), 0, 1, 1, settings())
    assert share.cpus == "auto"
    assert share.memory == 20 * GIB


def test_replicas_share_no_core() -> None:
    cores = physical_cores(usable_cpus())
    if len(cores) < 2:
        pytest.skip("one core")
    shares = [share_of(machine(24), rank, 2, 1, settings()) for rank in range(2)]
    bound = [set(share.cpus.split(",")) for share in shares]
    assert not bound[0] & bound[1]
    assert sum(share.memory for share in shares) <= 20 * GIB


def test_more_replicas_than_cores_take_turns() -> None:
    count = 2 * len(physical_cores(usable_cpus())) + 1
    shares = [share_of(machine(24), rank, count, 1, settings()) for rank in range(count)]
    assert {share.cpus for share in shares} == {str(core) for core in physical_cores(usable_cpus())}


def test_replicas_on_machines_of_their_own_need_not_share() -> None:
    assert share_of(machine(24), 0, 4, 4, settings()).cpus == "auto"


def test_a_given_number_of_cpus_holds_whatever_the_number_of_replicas() -> None:
    shares = {share_of(machine(24), 0, count, 1, settings(1)).cpus for count in (1, 2, 5)}
    assert len(shares) == 1


def test_replicas_in_a_container_share_what_its_quota_lasts_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 1.0)
    (core,) = physical_cores(usable_cpus())
    assert {share_of(machine(24), rank, 2, 1, settings()).cpus for rank in range(2)} == {str(core)}
