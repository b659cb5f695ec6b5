"""One replica's plan, and whether the replicas have room."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.cluster.planning import as_asked, check_room, plan_on_any, plan_replica
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


def test_replicas_of_different_cpus_compute_alike(tmp_path: Path) -> None:
    """One goes on with what another has begun."""
    old, new = replace(machine(32), half_precision=False), machine(16)
    for machines in ([old, new], [new, old], [old]):
        arguments = plan_on_any(machines, settings(tmp_path), ()).arguments
        assert arguments[arguments.index("--dtype") + 1] == "float32"


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
    wanted = settings(tmp_path, scaling={"max_replicas": 3})
    with pytest.raises(SetupError, match=r"--scaling.max-replicas 3"):
        check_room(wanted, gpus(2), plan_replica(wanted, gpus(2), ()))


def test_stages_on_several_nodes_are_passed_to_vllm(tmp_path: Path) -> None:
    plan = plan_replica(settings(tmp_path, cluster={"pipeline_parallel_size": 2}), gpus(1), ["--seed", "7"])
    at = plan.arguments.index("--pipeline-parallel-size")
    assert plan.arguments[at + 1] == "2"
    assert plan.arguments[-2:] == ["--seed", "7"]


def large(folder: Path, **groups: Any) -> Settings:
    """Weights of 20 GiB, which are a hole in a file."""
    found = settings(folder, **groups)
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.truncate(20 * GIB)
    return found


def test_two_nodes_hold_a_model_that_is_too_large_for_one(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="does not fit"):
        plan_replica(large(tmp_path), gpus(1, 16), ())
    arguments = plan_replica(large(tmp_path, cluster={"pipeline_parallel_size": 2}), gpus(1, 16), ()).arguments
    assert parallel(arguments) == "1"
    assert arguments[arguments.index("--pipeline-parallel-size") + 1] == "2"


def test_a_stage_takes_as_few_gpus_as_its_share_fits(tmp_path: Path) -> None:
    wanted = large(tmp_path, cluster={"pipeline_parallel_size": 2})
    assert parallel(plan_replica(wanted, gpus(4, 16), ()).arguments) == "1"
    assert parallel(plan_replica(wanted, gpus(4, 8), ()).arguments) == "2"


def test_stages_that_would_be_spread_over_nodes_are_refused(tmp_path: Path) -> None:
    wanted = settings(tmp_path, cluster={"pipeline_parallel_size": 2}, engine={"tensor_parallel_size": 2})
    assert parallel(plan_on_any([gpus(2), gpus(4)], wanted, ()).arguments) == "2"
    with pytest.raises(SetupError, match=r"--engine.tensor-parallel-size 2: .* one has 3 GPU"):
        plan_on_any([gpus(2), gpus(3)], wanted, ())


def test_stages_need_gpus(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"--cluster.pipeline-parallel-size 2"):
        plan_replica(settings(tmp_path, cluster={"pipeline_parallel_size": 2}), machine(24), ())


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([gpus(1, 80), gpus(1, 48)], "1"),  # fits both
        ([gpus(8, 80), gpus(4, 16)], "2"),  # it may be given two small ones
        ([gpus(1, 80), gpus(4, 16)], "2"),  # one node is left out
        ([gpus(8, 80), gpus(1, 16)], "2"),  # the other one
    ],
)
def test_a_replica_fits_whichever_node_ray_gives_it(tmp_path: Path, nodes: list[Machine], count: str) -> None:
    for order in (nodes, nodes[::-1]):
        assert parallel(plan_on_any(order, large(tmp_path), ()).arguments) == count


def test_gpus_of_one_machine_are_taken_for_the_smallest(tmp_path: Path) -> None:
    mixed = Machine(16, 256 * GIB, 256 * GIB, (*gpus(1, 80).gpus, *gpus(1, 8).gpus))
    with pytest.raises(SetupError, match="does not fit"):
        plan_on_any([mixed], large(tmp_path), ())


def test_without_gpus_the_least_memory_decides(tmp_path: Path) -> None:
    plan_on_any([machine(64), machine(48)], large(tmp_path), ())
    with pytest.raises(SetupError, match="does not fit"):
        plan_on_any([machine(64), machine(16)], large(tmp_path), ())


def test_gpus_are_left_alone_where_cpus_are_asked_for(tmp_path: Path) -> None:
    plan = plan_replica(settings(tmp_path, cluster={"accelerator": "cpu"}), gpus(2), ())
    assert "--worker-cls" in plan.arguments
    assert "--tensor-parallel-size" not in plan.arguments


def test_no_cpu_is_taken_for_a_gpu(tmp_path: Path) -> None:
    wanted = settings(tmp_path, cluster={"accelerator": "gpu"})
    assert as_asked(gpus(2), wanted) == gpus(2)
    with pytest.raises(SetupError, match=r"--cluster.accelerator gpu: .* set cpu"):
        plan_replica(wanted, machine(24), ())


def test_cpus_hold_any_number(tmp_path: Path) -> None:
    many = settings(tmp_path, cluster={"replicas": 9, "surge": True})
    check_room(many, machine(24), plan_replica(many, machine(24), ()))
