"""The engine as a Serve application: `ray.serve.llm` with direct streaming around the single machine's plan."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from synthia_vllm.cluster.planning import as_asked, plan_on_any
from synthia_vllm.cluster.private_ray import LocalModelCallback
from synthia_vllm.cluster.server import OWN_CONFIG, Engine
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.hardware import Machine, inspect_machine
from synthia_vllm.engine.server import parse_arguments
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings, dump

# One id for every model: it names the deployment (see config.ENGINE_DEPLOYMENT). Replicas answer to the others as well.
MODEL_ID = "synthia"
_HARDLY_ANY_CPU = 0.01
_NODE_WAIT_S = 1800.0  # a cloud may take most of that to find a machine with a GPU
_TELL_S = 60.0
_POLL_S = 2.0
Node = dict[str, Any]  # as `ray.nodes()` describes it
_log = logging.getLogger("ray.serve")  # into the log of this application's deployment
# Set by us or by Ray for each replica, or of a server that is not started here.
_NOT_FOR_REPLICAS = {"model", "model_tag", "served_model_name", "config", "distributed_executor_backend"}


def build_engine(settings: Settings, vllm_options: Sequence[str]) -> Application:
    machines = engine_machines(settings)
    plan = plan_on_any(machines, settings, vllm_options)
    kwargs = engine_kwargs(plan.arguments)
    keeps_cache = any(option.startswith("--kv-cache-memory-bytes") for option in vllm_options)
    config = llm_config(settings, machines[0], plan, kwargs, keeps_cache=keeps_cache)
    # As `build_openai_app` builds it for direct streaming, but for the LLMRouter beside it: gateways choose replicas.
    return build_llm_deployment(config, deployment_cls=serve.ingress()(Engine))


def engine_machines(settings: Settings, wait_s: float = _NODE_WAIT_S) -> list[Machine]:
    """The machines of the cluster that Ray may start replicas on, by `--cluster.accelerator`.

    With `cpu` and `gpu` waits until there is one. `auto` takes what is there: nodes with GPUs, else with CPUs, else
    this machine. Memory counts as free even where replicas that are about to be replaced still hold it. Raises
    SetupError where no such node joins, or nvidia-smi shows fewer GPUs than Ray counts.
    """
    accelerator = settings.cluster.accelerator
    if accelerator != "auto":
        machines = _inspect(_wait_for_nodes(accelerator, wait_s), settings)
    elif nodes := _nodes_with("GPU") or _nodes_with("CPU"):
        machines = _inspect(nodes, settings)
    else:
        machines = [replace(inspect_machine(), gpus=())]
    return [
        replace(
            machine,
            memory_available=machine.memory_total,
            gpus=tuple(replace(gpu, memory_free=gpu.memory_total) for gpu in machine.gpus),
        )
        for machine in machines
    ]


def _nodes_with(resource: str) -> list[Node]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) >= 1]


def _wait_for_nodes(accelerator: str, wait_s: float) -> list[Node]:
    """The nodes with this accelerator, as soon as there is one: KubeRay deploys when no more than Ray's head is up."""
    resource = accelerator.upper()
    if nodes := _nodes_with(resource):
        return nodes
    # Ray's autoscaler starts nodes for what is asked for, and nobody else asks.
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if accelerator == "gpu" else {"num_cpus": 1}
    demand = ray.remote(_nothing).options(**options).remote()
    began = tell = time.monotonic()
    try:
        while not (nodes := _nodes_with(resource)):
            now = time.monotonic()
            if now - began >= wait_s:
                raise SetupError(
                    f"--cluster.accelerator {accelerator}: within {wait_s:.0f} s no node joined on which Ray counts a "
                    f"{resource} (see `ray status`); add one and deploy again, or set another accelerator"
                )
            if now >= tell:
                _log.info("--cluster.accelerator: waiting for a node with a %s, %.0f s so far", resource, now - began)
                tell = now + _TELL_S
            time.sleep(_POLL_S)
        return nodes
    finally:
        ray.cancel(demand)


def _nothing() -> None:
    """Runs as soon as there is room for it."""


def _inspect(nodes: Sequence[Node], settings: Settings) -> list[Machine]:
    """What these nodes have, of their GPUs as many as Ray gives away; without those that are gone meanwhile."""
    here = ray.get_runtime_context().get_node_id()
    answers = [None if node["NodeID"] == here else _ask(node["NodeID"]) for node in nodes]
    machines = []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            machine = inspect_machine() if answer is None else ray.get(answer)
        except RayError as error:
            _log.warning("node %s did not tell what it has: %s", node["NodeID"], error)
            continue
        count = int(node["Resources"].get("GPU", 0)) if settings.cluster.accelerator != "cpu" else 0
        if len(machine.gpus) < count:
            raise SetupError(
                f"--cluster.accelerator: Ray counts {count} GPU(s) on node {node['NodeID']}, and nvidia-smi shows "
                f"{len(machine.gpus)} there; is the driver in the container?"
            )
        machines.append(as_asked(replace(machine, gpus=machine.gpus[:count]), settings))
    if not machines:
        raise SetupError("--cluster.accelerator: no node of the cluster answered (see `ray status`); deploy again")
    return machines


def _ask(node_id: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(inspect_machine).options(num_cpus=0, scheduling_strategy=there).remote()


def engine_kwargs(arguments: list[str]) -> dict[str, Any]:
    """What a vLLM command line says beyond vLLM's defaults, by the names of vLLM's dataclasses."""
    given, default = vars(parse_arguments(arguments)), vars(parse_arguments([]))
    said = {key: value for key, value in given.items() if value != default.get(key)}
    return {key: value for key, value in said.items() if key not in _NOT_FOR_REPLICAS} | {"disable_log_stats": False}


def llm_config(
    settings: Settings, machine: Machine, plan: EnginePlan, kwargs: dict[str, Any], *, keeps_cache: bool
) -> LLMConfig:
    """What `ray.serve.llm` is told.

    Bundles are of one GPU, as vLLM wants them (`v1/executor/ray_utils.py`, `initialize_ray_cluster` refuses larger
    ones), and on one node where tensor parallelism has to be fast. With pipeline stages they are packed: node by node
    full, and `plan_on_any` sees to it that a node holds whole stages.
    """
    stages = kwargs.get("pipeline_parallel_size", 1)
    devices = kwargs.get("tensor_parallel_size", 1) * stages
    cpus = settings.cluster.cpus_per_replica or _HARDLY_ANY_CPU
    bundle = {"GPU": 1.0, "CPU": cpus / devices} if machine.gpus else {"CPU": cpus}
    return LLMConfig(
        model_loading_config={"model_id": MODEL_ID, "model_source": plan.model},
        engine_kwargs=kwargs,
        accelerator_config={"kind": "gpu" if machine.gpus else "cpu"},
        placement_group_config={"bundles": [bundle] * devices, "strategy": "PACK" if stages > 1 else "STRICT_PACK"},
        # A number, else `ray.serve.llm` scales by a policy of its own; how many is in the Serve config.
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
        runtime_env={"env_vars": plan.environment},
        log_engine_metrics=False,  # vLLM's own series on each replica's /metrics, not renamed copies at Ray's agents
        server_cls=Engine,
        callback_config={"callback_class": LocalModelCallback},
        experimental_configs={
            OWN_CONFIG: {
                "settings": dump(settings),
                "name": plan.name,
                "shares_machine": not machine.gpus,
                "keeps_cache": keeps_cache,
            }
        },
    )
