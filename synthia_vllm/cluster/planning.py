"""One replica's plan, without Ray or vLLM, so that `cluster up` fails before anything starts."""

from collections.abc import Sequence
from dataclasses import replace

from synthia_vllm.engine.arguments import EnginePlan, plan_engine
from synthia_vllm.engine.hardware import Machine
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings

REPLAY = "synthia_vllm.engine.replay:Replay"  # imports vLLM


def plan_replica(settings: Settings, machine: Machine, vllm_options: Sequence[str]) -> EnginePlan:
    """One replica's plan on a cluster of machines like this one."""
    return plan_on_any([machine], settings, vllm_options)


def plan_on_any(machines: Sequence[Machine], settings: Settings, vllm_options: Sequence[str]) -> EnginePlan:
    """One replica's plan that holds on whichever of these machines Ray starts it.

    Ray knows how many GPUs a machine has, and not how large they are. So a replica that takes so many of one machine is
    planned for the smallest GPU of all machines that have as many; without GPUs for the machine with the least memory.
    It takes as few GPUs as the model fits, so that there can be as many replicas as possible.
    """
    machines = [as_asked(machine, settings) for machine in machines]
    options = [*_replay(settings, machines[0], vllm_options), *vllm_options]
    most = max(len(machine.gpus) for machine in machines)
    if not most:
        if settings.cluster.pipeline_parallel_size > 1:
            raise SetupError(
                f"--cluster.pipeline-parallel-size {settings.cluster.pipeline_parallel_size}: only GPUs share a model "
                "layer by layer; leave it out, or set --cluster.accelerator gpu where GPUs will join"
            )
        least = min(machines, key=lambda machine: machine.memory_available)
        # Replicas compute alike: one may go on with what another has begun.
        half_precision = all(machine.half_precision for machine in machines)
        return plan_engine(settings, replace(least, half_precision=half_precision), options)
    asked = settings.engine.tensor_parallel_size
    for count in range(1, most) if asked is None else ():
        try:
            return _plan_on_gpus(count, machines, settings, options)
        except SetupError:
            continue
    return _plan_on_gpus(most if asked is None else min(asked, most), machines, settings, options)


def as_asked(machine: Machine, settings: Settings) -> Machine:
    """The machine as `--cluster.accelerator` has it used. Raises SetupError where it lacks the GPU asked for."""
    if settings.cluster.accelerator == "cpu":
        return replace(machine, gpus=())
    if settings.cluster.accelerator == "gpu" and not machine.gpus:
        raise SetupError(
            "--cluster.accelerator gpu: nvidia-smi shows no GPU on this machine; is the driver there, and in the "
            "container? Else set cpu, or give the --cluster.address of a Ray cluster that has GPUs"
        )
    return machine


def _plan_on_gpus(count: int, machines: Sequence[Machine], settings: Settings, options: Sequence[str]) -> EnginePlan:
    stages = settings.cluster.pipeline_parallel_size
    large = [machine for machine in machines if len(machine.gpus) >= count]
    smallest = min((gpu for machine in large for gpu in machine.gpus), key=lambda gpu: gpu.memory_free)
    plan = plan_engine(settings, replace(large[0], gpus=(smallest,) * count), options, stages=stages)
    of_stage = gpus_of_stage(plan)
    for machine in machines if stages > 1 else ():
        # vLLM takes no bundle of more than one GPU, and gives ranks to bundles node by node: stages stay whole where
        # each node holds a whole number of them.
        if len(machine.gpus) % of_stage:
            raise SetupError(
                f"--engine.tensor-parallel-size {of_stage}: a stage would be spread over nodes, since one has "
                f"{len(machine.gpus)} GPU(s); set a divisor of each node's number of GPUs"
            )
    return plan


def gpus_of_stage(plan: EnginePlan) -> int:
    """GPUs of one node that a replica takes, or one of its stages."""
    last = len(plan.arguments) - plan.arguments[::-1].index("--tensor-parallel-size")
    return int(plan.arguments[last])


def _replay(settings: Settings, machine: Machine, vllm_options: Sequence[str]) -> list[str]:
    """The option that lets this replica take up replies whose state is more than their ids."""
    wanted = settings.cluster.replay if settings.cluster.replay is not None else not machine.gpus
    if any(option.startswith("--speculative-config") for option in vllm_options):
        if settings.cluster.replay:
            raise SetupError("--cluster.replay: vLLM takes no logits processor beside --speculative-config")
        return []
    return ["--logits-processors", REPLAY] if wanted else []


def most_replicas(settings: Settings) -> tuple[int, str]:
    """How many engine replicas there may be at most, and the option that says so."""
    most = settings.scaling.max_replicas
    return (most, "--scaling.max-replicas") if most else (settings.cluster.replicas, "--cluster.replicas")


def check_room(settings: Settings, machine: Machine, plan: EnginePlan) -> None:
    """Raises SetupError where this machine has not the GPUs for the replicas that are asked for."""
    machine = as_asked(machine, settings)
    if not machine.gpus:
        return
    each = gpus_of_stage(plan) * settings.cluster.pipeline_parallel_size
    most, option = most_replicas(settings)
    if most * each > len(machine.gpus):
        raise SetupError(
            f"{option} {most}: each takes {each} GPU(s) and this machine has {len(machine.gpus)}; ask for "
            f"{len(machine.gpus) // each}, or join other machines to a Ray cluster and give --cluster.address"
        )
    if settings.cluster.surge and (settings.cluster.replicas + 1) * each > len(machine.gpus):
        raise SetupError(
            f"--cluster.surge: a rollout needs {(settings.cluster.replicas + 1) * each} GPU(s) and this machine has "
            f"{len(machine.gpus)}; leave it out, or ask for fewer --cluster.replicas"
        )
