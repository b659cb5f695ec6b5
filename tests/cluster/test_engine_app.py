"""What `ray.serve.llm` is told. Nothing starts here."""

from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.cluster.config import ENGINE_DEPLOYMENT
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.settings import Settings
from tests.engine.test_memory import machine, write_model

pytestmark = pytest.mark.e2e  # imports vLLM


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


def test_the_deployment_has_the_name_that_the_config_speaks_of() -> None:
    from synthia_vllm.cluster.engine_app import MODEL_ID
    from synthia_vllm.cluster.server import Engine

    assert f"{Engine.__name__}:{MODEL_ID}" == ENGINE_DEPLOYMENT
