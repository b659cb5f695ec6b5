"""What `ray.serve.llm` is told. Nothing starts here."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from synthia_vllm.cluster.config import ENGINE_DEPLOYMENT
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import ClusterSettings, Settings
from tests.engine.test_memory import machine, write_model

pytestmark = pytest.mark.e2e  # imports vLLM
GPU = Gpu("GPU", 80 * GIB, 60 * GIB)  # a replica that is to be replaced holds some of it
HEAD = machine(4)


def config_for(folder: Path, where: Machine, **groups: Any) -> Any:
    from synthia_vllm.cluster.engine_app import engine_kwargs, llm_config
    from synthia_vllm.cluster.planning import plan_replica

    settings = Settings(model=str(write_model(folder)), **groups)
    plan = plan_replica(settings, where, ())
    return llm_config(settings, where, plan, engine_kwargs(plan.arguments), keeps_cache=False)


def test_the_contract_is_in_vllms_arguments(tmp_path: Path) -> None:
    config = config_for(tmp_path, machine(24))
    kwargs = config.engine_kwargs
    assert kwargs["chat_template"].endswith(".jinja")
    assert kwargs["generation_config"] == "vllm"
    assert kwargs["enable_request_id_headers"] is True
    assert config.runtime_env["env_vars"]["VLLM_MAX_STOP_STRINGS"]
    assert config.log_engine_metrics is False
    assert kwargs["disable_log_stats"] is False


def test_replicas_on_gpus_take_whole_ones(tmp_path: Path) -> None:
    two = Machine(16, 256 * GIB, 256 * GIB, (Gpu("GPU", 80 * GIB, 80 * GIB),) * 2)
    config = config_for(tmp_path, two, engine={"tensor_parallel_size": 2})
    assert config.accelerator_config.kind == "gpu"
    assert [bundle["GPU"] for bundle in config.placement_group_config["bundles"]] == [1.0, 1.0]
    assert config.placement_group_config["strategy"] == "STRICT_PACK"
    assert config.get_engine_config().placement_strategy == "STRICT_PACK"


def test_stages_may_be_on_several_nodes(tmp_path: Path) -> None:
    two = Machine(16, 256 * GIB, 256 * GIB, (GPU,) * 2)
    config = config_for(
        tmp_path, two, engine={"tensor_parallel_size": 2}, cluster={"pipeline_parallel_size": 2, "cpus_per_replica": 8}
    )
    assert config.placement_group_config == {"bundles": [{"GPU": 1.0, "CPU": 2.0}] * 4, "strategy": "PACK"}


def test_vllm_takes_no_bundle_of_several_gpus() -> None:
    """Why a stage is not one bundle."""
    from vllm.v1.executor import ray_utils

    group = SimpleNamespace(bundle_specs=[{"GPU": 2.0}, {"GPU": 2.0}])
    config = SimpleNamespace(placement_group=group, world_size=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray_utils.ray, "is_initialized", lambda: True)
        patched.setattr("vllm.platforms.current_platform", SimpleNamespace(ray_device_key="GPU", is_cuda=lambda: False))
        with pytest.raises(ValueError, match="more than 1 GPU"):
            ray_utils.initialize_ray_cluster(config)


def test_the_deployment_has_the_name_that_the_config_speaks_of() -> None:
    from synthia_vllm.cluster.engine_app import MODEL_ID
    from synthia_vllm.cluster.server import Engine

    assert f"{Engine.__name__}:{MODEL_ID}" == ENGINE_DEPLOYMENT


def node_id(name: str) -> str:
    return name.encode().hex().ljust(56, "0")


class DescribedRay:
    """Ray's nodes as described, a look at them, and what was asked of the autoscaler."""

    def __init__(self, **nodes: tuple[Machine, dict[str, float]]) -> None:
        self.machines = {name: found for name, (found, _) in nodes.items()}
        self.resources = {name: resources for name, (_, resources) in nodes.items()}
        self.joins: dict[str, float] | None = None  # with the look after the demand
        self.demanded: list[dict[str, Any]] = []
        self.cancelled = 0

    def nodes(self) -> list[dict[str, Any]]:
        if self.joins is not None and self.demanded:
            self.machines["late"], self.resources["late"] = Machine(16, 256 * GIB, 99 * GIB, (GPU,)), self.joins
        gone = {"NodeID": node_id("gone"), "Alive": False, "Resources": {"GPU": 8.0, "CPU": 8.0}}
        return [
            gone,
            *({"NodeID": node_id(name), "Alive": True, "Resources": found} for name, found in self.resources.items()),
        ]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: node_id("head"))

    def remote(self, _: object) -> "DescribedRay":
        return self

    def options(self, **options: Any) -> Any:
        there = options.pop("scheduling_strategy", None)
        if there is None:
            return SimpleNamespace(remote=lambda: self.demanded.append(options))
        return SimpleNamespace(remote=lambda: there.node_id)

    def get(self, asked: str) -> Machine:
        from ray.exceptions import RayError

        for name, found in self.machines.items():
            if node_id(name) == asked:
                return found
        raise RayError(asked)

    def cancel(self, _: object) -> None:
        self.cancelled += 1


def machines(patched: pytest.MonkeyPatch, ray: DescribedRay, accelerator: str = "auto") -> list[Machine]:
    from synthia_vllm.cluster import engine_app

    patched.setattr(engine_app, "ray", ray)
    patched.setattr(engine_app, "inspect_machine", lambda: ray.machines.get("head", HEAD))
    patched.setattr(engine_app, "_POLL_S", 0.0)
    settings = Settings(cluster=ClusterSettings.model_validate({"accelerator": accelerator}))
    return engine_app.engine_machines(settings, wait_s=0.1)


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_replicas_are_planned_for_all_nodes_that_have_gpus(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    small = Gpu("GPU", 24 * GIB, 20 * GIB)
    ray = DescribedRay(
        head=(HEAD, {"CPU": 2.0}),
        one=(Machine(16, 256 * GIB, 99 * GIB, (GPU,) * 4), {"CPU": 16.0, "GPU": 2.0}),  # Ray gives two away
        two=(Machine(8, 64 * GIB, 60 * GIB, (small,)), {"CPU": 8.0, "GPU": 1.0}),
    )
    assert machines(monkeypatch, ray, accelerator) == [
        Machine(16, 256 * GIB, 256 * GIB, (replace(GPU, memory_free=80 * GIB),) * 2),
        Machine(8, 64 * GIB, 64 * GIB, (Gpu("GPU", 24 * GIB, 24 * GIB),)),
    ]
    assert ray.demanded == []


def test_one_machine_is_planned_for_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machines(monkeypatch, DescribedRay(head=(HEAD, {"CPU": 2.0}))) == [HEAD]
    gpus = replace(HEAD, gpus=(replace(GPU, memory_free=GPU.memory_total),))
    assert machines(monkeypatch, DescribedRay(head=(gpus, {"CPU": 2.0, "GPU": 1.0}))) == [gpus]
    assert machines(monkeypatch, DescribedRay(head=(gpus, {"CPU": 2.0}))) == [HEAD]  # Ray gives none away


def test_without_gpus_the_head_counts_only_if_replicas_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 4 GiB where KubeRay's workers have 64."""
    worker = machine(64)
    ray = DescribedRay(head=(HEAD, {}), worker=(worker, {"CPU": 8.0}))
    assert machines(monkeypatch, ray) == machines(monkeypatch, ray, "cpu") == [worker]


@pytest.mark.parametrize(
    ("accelerator", "joins", "asked"),
    [
        ("gpu", {"CPU": 8.0, "GPU": 1.0}, {"num_cpus": 0, "num_gpus": 1}),
        ("cpu", {"CPU": 8.0}, {"num_cpus": 1}),
    ],
)
def test_a_node_is_waited_and_asked_for(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, joins: dict[str, float], asked: dict[str, float]
) -> None:
    ray = DescribedRay(head=(HEAD, {}))
    ray.joins = joins
    (found,) = machines(monkeypatch, ray, accelerator)
    assert len(found.gpus) == joins.get("GPU", 0)
    assert (ray.demanded, ray.cancelled) == ([asked], 1)


def test_a_node_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ray = DescribedRay(head=(HEAD, {"CPU": 2.0}))
    with (
        caplog.at_level("INFO", logger="ray.serve"),
        pytest.raises(SetupError, match=r"--cluster.accelerator gpu: .* GPU"),
    ):
        machines(monkeypatch, ray, "gpu")
    assert ray.cancelled == 1
    assert "waiting for a node with a GPU" in caplog.text


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_gpus_that_the_driver_does_not_show_are_named(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    ray = DescribedRay(head=(HEAD, {}), blind=(machine(64), {"CPU": 8.0, "GPU": 1.0}))
    with pytest.raises(SetupError, match=r"node [0-9a-f]{56}, and nvidia-smi shows 0"):
        machines(monkeypatch, ray, accelerator)
    assert machines(monkeypatch, ray, "cpu") == [machine(64)]


def test_a_node_that_is_lost_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"CPU": 8.0, "GPU": 1.0}
    ray = DescribedRay(one=(replace(machine(64), gpus=(GPU,)), gpu), lost=(HEAD, gpu))
    del ray.machines["lost"]
    (found,) = machines(monkeypatch, ray)
    assert found.memory_total == 64 * GIB
    del ray.machines["one"]
    with pytest.raises(SetupError, match="deploy again"):
        machines(monkeypatch, ray)
