"""The engine as a Serve application: `ray.serve.llm` with direct streaming around the single machine's plan."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from synthia_vllm.cluster.planning import plan_replica
from synthia_vllm.cluster.serve_internals import LocalModelCallback
from synthia_vllm.cluster.server import OWN_CONFIG, Engine
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.hardware import Machine, inspect_machine
from synthia_vllm.engine.server import parse_arguments
from synthia_vllm.settings import Settings

# One id for every model: it names the deployment (see config.ENGINE_DEPLOYMENT). Replicas answer to the others as well.
MODEL_ID = "synthia"
_HARDLY_ANY_CPU = 0.01
# Set by us or by Ray for each replica, or of a server that is not started here.
_NOT_FOR_REPLICAS = {"model", "model_tag", "served_model_name", "config", "distributed_executor_backend"}


def build_engine(settings: Settings, vllm_options: Sequence[str]) -> Application:
    machine = engine_machine()
    plan = plan_replica(settings, machine, vllm_options)
    kwargs = engine_kwargs(plan.arguments)
    keeps_cache = any(option.startswith("--kv-cache-memory-bytes") for option in vllm_options)
    return build_openai_app({"llm_configs": [llm_config(settings, machine, plan, kwargs, keeps_cache=keeps_cache)]})


def engine_machine() -> Machine:
    """A machine of the cluster that replicas will run on: one with GPUs if there is any, else this one.

    Memory counts as free even where replicas that are about to be replaced still hold it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if not nodes:
        here = inspect_machine()
        return replace(here, memory_available=here.memory_total)
    there = NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=False)
    machine: Machine = ray.get(ray.remote(inspect_machine).options(num_cpus=0, scheduling_strategy=there).remote())
    return replace(machine, gpus=tuple(replace(gpu, memory_free=gpu.memory_total) for gpu in machine.gpus))


def engine_kwargs(arguments: list[str]) -> dict[str, Any]:
    """What a vLLM command line says beyond vLLM's defaults, by the names of vLLM's dataclasses."""
    given, default = vars(parse_arguments(arguments)), vars(parse_arguments([]))
    said = {key: value for key, value in given.items() if value != default.get(key)}
    return {key: value for key, value in said.items() if key not in _NOT_FOR_REPLICAS} | {"disable_log_stats": False}


def llm_config(
    settings: Settings, machine: Machine, plan: EnginePlan, kwargs: dict[str, Any], *, keeps_cache: bool
) -> LLMConfig:
    devices = kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)
    cpus = settings.cluster.cpus_per_replica or _HARDLY_ANY_CPU
    bundle = {"GPU": 1.0, "CPU": cpus / devices} if machine.gpus else {"CPU": cpus}
    return LLMConfig(
        model_loading_config={"model_id": MODEL_ID, "model_source": plan.model},
        engine_kwargs=kwargs,
        accelerator_config={"kind": "gpu" if machine.gpus else "cpu"},
        placement_group_config={"bundles": [bundle] * devices},
        # A number, else `ray.serve.llm` scales by a policy of its own; how many is in the Serve config.
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
        runtime_env={"env_vars": plan.environment},
        log_engine_metrics=False,  # vLLM's own series on each replica's /metrics, not renamed copies at Ray's agents
        server_cls=Engine,
        callback_config={"callback_class": LocalModelCallback},
        experimental_configs={
            OWN_CONFIG: {
                "settings": settings.model_dump(mode="json", exclude_defaults=True),
                "name": plan.name,
                "shares_machine": not machine.gpus,
                "keeps_cache": keeps_cache,
            }
        },
    )
