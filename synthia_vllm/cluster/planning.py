"""One replica's plan, without Ray or vLLM, so that `cluster up` fails before anything starts."""

from collections.abc import Sequence
from dataclasses import replace

from synthia_vllm.engine.arguments import EnginePlan, plan_engine
from synthia_vllm.engine.hardware import Machine
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings

REPLAY = "synthia_vllm.engine.replay:Replay"  # imports vLLM


def plan_replica(settings: Settings, machine: Machine, vllm_options: Sequence[str]) -> EnginePlan:
    """One replica's plan. It takes as few GPUs as the model fits, so that there can be as many replicas as possible."""
    stages = settings.cluster.pipeline_parallel_size
    options = [
        *(["--pipeline-parallel-size", str(stages)] if stages > 1 else []),
        *_replay(settings, machine, vllm_options),
    ]
    options += vllm_options
    if settings.engine.tensor_parallel_size or stages > 1 or not machine.gpus:
        return plan_engine(settings, machine, options)
    for count in range(1, len(machine.gpus)):
        try:
            return plan_engine(settings, replace(machine, gpus=machine.gpus[:count]), options)
        except SetupError:
            continue
    return plan_engine(settings, machine, options)


def _replay(settings: Settings, machine: Machine, vllm_options: Sequence[str]) -> list[str]:
    """The option that lets this replica take up replies whose state is more than their ids."""
    wanted = settings.cluster.replay if settings.cluster.replay is not None else not machine.gpus
    if any(option.startswith("--speculative-config") for option in vllm_options):
        if settings.cluster.replay:
            raise SetupError("--cluster.replay: vLLM takes no logits processor beside --speculative-config")
        return []
    return ["--logits-processors", REPLAY] if wanted else []


def check_room(settings: Settings, machine: Machine, plan: EnginePlan) -> None:
    """Raises SetupError where this machine has not the GPUs for the replicas that are asked for."""
    if not machine.gpus:
        return
    each = int(plan.arguments[plan.arguments.index("--tensor-parallel-size") + 1])
    each *= settings.cluster.pipeline_parallel_size
    count = settings.cluster.max_replicas or settings.cluster.replicas
    option = "max-replicas" if settings.cluster.max_replicas else "replicas"
    if count * each > len(machine.gpus):
        raise SetupError(
            f"--cluster.{option} {count}: each takes {each} GPU(s) and this machine has {len(machine.gpus)}; ask for "
            f"{len(machine.gpus) // each}, or join other machines to a Ray cluster and give --cluster.address"
        )
    if settings.cluster.surge and (settings.cluster.replicas + 1) * each > len(machine.gpus):
        raise SetupError(
            f"--cluster.surge: a rollout needs {(settings.cluster.replicas + 1) * each} GPU(s) and this machine has "
            f"{len(machine.gpus)}; leave it out, or ask for fewer --cluster.replicas"
        )
