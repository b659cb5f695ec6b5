"""One replica's plan, and whether the replicas have room."""

from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.cluster.planning import check_room, plan_replica
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings
from tests.engine.test_memory import machine, write_model


def settings(folder: Path, **groups: Any) -> Settings:
    return Settings(model=str(write_model(folder)), **groups)


def gpus(count: int, gib: int = 80) -> Machine:
    return Machine(16, 256 * GIB, 256 * GIB, (Gpu("GPU", gib * GIB, gib * GIB),) * count)


def parallel(arguments: list[str]) -> str:
    return arguments[arguments.index("--tensor-parallel-size") + 1]


def test_a_replica_takes_as_few_gpus_as_the_model_fits(tmp_path: Path) -> None:
    assert parallel(plan_replica(settings(tmp_path), gpus(4), ()).arguments) == "1"
    asked = settings(tmp_path, engine={"tensor_parallel_size": 2})
    assert parallel(plan_replica(asked, gpus(4), ()).arguments) == "2"


def test_one_gpu_holds_one_replica(tmp_path: Path) -> None:
    one = settings(tmp_path)
    check_room(one, gpus(1), plan_replica(one, gpus(1), ()))
    two = settings(tmp_path, cluster={"replicas": 2})
    with pytest.raises(SetupError, match=r"--cluster.replicas 2: .* this machine has 1; ask for 1"):
        check_room(two, gpus(1), plan_replica(two, gpus(1), ()))


def test_a_surge_needs_a_gpu_to_spare(tmp_path: Path) -> None:
    wanted = settings(tmp_path, cluster={"replicas": 2, "surge": True})
    check_room(wanted, gpus(3), plan_replica(wanted, gpus(3), ()))
    with pytest.raises(SetupError, match=r"--cluster.surge"):
        check_room(wanted, gpus(2), plan_replica(wanted, gpus(2), ()))


def test_scaling_is_checked_at_its_most(tmp_path: Path) -> None:
    wanted = settings(tmp_path, cluster={"replicas": 1, "max_replicas": 3})
    with pytest.raises(SetupError, match=r"--cluster.max-replicas 3"):
        check_room(wanted, gpus(2), plan_replica(wanted, gpus(2), ()))


def test_stages_on_several_nodes_are_passed_to_vllm(tmp_path: Path) -> None:
    plan = plan_replica(settings(tmp_path, cluster={"pipeline_parallel_size": 2}), gpus(1), ["--seed", "7"])
    at = plan.arguments.index("--pipeline-parallel-size")
    assert plan.arguments[at + 1] == "2"
    assert plan.arguments[-2:] == ["--seed", "7"]


def test_cpus_hold_any_number(tmp_path: Path) -> None:
    many = settings(tmp_path, cluster={"replicas": 9, "surge": True})
    check_room(many, machine(24), plan_replica(many, machine(24), ()))
