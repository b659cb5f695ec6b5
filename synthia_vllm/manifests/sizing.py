"""Does it fit there: the model, its KV cache and the replicas on machines that are described and not seen."""

from dataclasses import dataclass
from pathlib import Path

from synthia_vllm.cluster.config import check_agreement
from synthia_vllm.cluster.planning import most_replicas
from synthia_vllm.engine.arguments import DEMO, SYNTHIA
from synthia_vllm.engine.hardware import GIB, Gpu, Machine
from synthia_vllm.engine.memory import Geometry, check_gpu_memory, choose_kv_bytes, in_float32, read_geometry
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings

# Beyond the longest drain: our port leaves the balancers' lists, and processes end.
STOP_MARGIN_S = 30
# Known without the hub, so that files come out the same everywhere. Sources: SOLAR-10.7B's config.json, which the
# Synthia card's model is built on, in bfloat16 (10.7 billion parameters); the demo model's own.
_KNOWN = {
    SYNTHIA: Geometry(context=4096, heads=32, kv_bytes_per_token=2 * 48 * 8 * 128 * 2, weight_bytes=2 * 10_731_524_096),
    DEMO: Geometry(context=8192, heads=9, kv_bytes_per_token=2 * 30 * 3 * 64 * 2, weight_bytes=2 * 134_515_008),
}


@dataclass(frozen=True)
class Sizing:
    """What one replica takes, and how long stopping it takes."""

    model: str  # 'demo', a hub id, or a folder there
    gpus: int  # of each node that a replica is on; 0: none
    nodes_per_replica: int
    grace_s: int  # from SIGTERM to SIGKILL
    geometry: Geometry | None  # None: a folder that is not here, so nothing was checked

    @property
    def flavour(self) -> str:
        return "cuda" if self.gpus else "cpu"


def size(settings: Settings, *, several: bool = True) -> Sizing:
    """Checks the settings against `settings.deploy`. `several`: replicas on Ray; else one server in one process.

    Raises SetupError that names both options that do not fit and what would.
    """
    check_agreement(settings)
    deploy = settings.deploy
    model = settings.model or (SYNTHIA if deploy.gpus_per_node else DEMO)
    stages = settings.cluster.pipeline_parallel_size if several else 1
    geometry = _geometry(model, settings.engine.dtype)
    gpus = _gpus(settings, geometry) if deploy.gpus_per_node else 0
    if settings.engine.tensor_parallel_size and not deploy.gpus_per_node:
        raise SetupError(
            f"--engine.tensor-parallel-size {settings.engine.tensor_parallel_size} does not fit "
            "--deploy.gpus-per-node 0: say how many GPUs a node has, or leave the first out"
        )
    if geometry is not None:
        _check_memory(settings, geometry, gpus, stages)
    if several:
        _check_replicas(settings, gpus, stages)
    return Sizing(model, gpus, stages, _grace(settings, several=several), geometry)


def _geometry(model: str, dtype: str) -> Geometry | None:
    if model in _KNOWN:
        return in_float32(_KNOWN[model]) if dtype == "float32" else _KNOWN[model]
    if model.startswith(("/", "~")) and not Path(model).expanduser().is_dir():
        return None  # a folder of the machines that it is for
    return read_geometry(model, dtype)


def _gpus(settings: Settings, geometry: Geometry | None) -> int:
    """GPUs of a node that one replica takes: as asked, else the fewest that hold the model."""
    has, asked = settings.deploy.gpus_per_node, settings.engine.tensor_parallel_size
    if asked is None:
        heads = geometry.heads if geometry else 1
        for count in (count for count in range(1, has) if heads % count == 0):
            try:
                if geometry is not None:
                    _check_memory(settings, geometry, count, settings.cluster.pipeline_parallel_size)
            except SetupError:
                continue
            return count
        return next(count for count in range(has, 0, -1) if heads % count == 0)
    if asked > has:
        raise SetupError(
            f"--engine.tensor-parallel-size {asked} does not fit --deploy.gpus-per-node {has}: a replica shares the "
            f"GPUs of one node; set at most {has}, or divide the layers among nodes "
            "(--cluster.pipeline-parallel-size)"
        )
    return asked


def _check_memory(settings: Settings, geometry: Geometry, gpus: int, stages: int) -> None:
    engine, deploy = settings.engine, settings.deploy
    context = engine.max_model_len or geometry.context
    if context > geometry.context:
        raise SetupError(f"--engine.max-model-len {context}: the model was made for {geometry.context} tokens")
    if not gpus:
        memory = int(deploy.memory_per_node_gib * GIB)
        machine = Machine(deploy.cpus_per_node, memory, memory, ())
        try:
            choose_kv_bytes(geometry, context, machine, engine.kv_cache_gib)
        except SetupError as error:
            raise SetupError(
                f"--deploy.memory-per-node-gib {deploy.memory_per_node_gib:g}: {error}; or give nodes with more"
            ) from None
        return
    each = int(deploy.gpu_memory_gib * GIB)
    machine = Machine(deploy.cpus_per_node, 0, 0, (Gpu("described", each, each),) * (gpus * stages))
    try:
        check_gpu_memory(geometry, context, machine, gpus * stages)
    except SetupError as error:
        raise SetupError(
            f"--deploy.gpu-memory-gib {deploy.gpu_memory_gib:g}: {error}; or give GPUs with more"
        ) from None
    if engine.kv_cache_gib is None:
        return
    # vLLM's option is for each GPU; a tenth is left to the driver, and one GiB to activations.
    room = deploy.gpu_memory_gib * 0.9 - 1 - (geometry.weight_bytes or 0) / GIB / (gpus * stages)
    if engine.kv_cache_gib > room:
        raise SetupError(
            f"--engine.kv-cache-gib {engine.kv_cache_gib:g} does not fit --deploy.gpu-memory-gib "
            f"{deploy.gpu_memory_gib:g}: beside the weights {room:.1f} are left on each of {gpus * stages} GPU(s); set "
            "at most that, or give GPUs with more"
        )


def _check_replicas(settings: Settings, gpus: int, stages: int) -> None:
    deploy, cluster = settings.deploy, settings.cluster
    if stages > deploy.nodes:
        raise SetupError(
            f"--cluster.pipeline-parallel-size {stages} does not fit --deploy.nodes {deploy.nodes}: each part of the "
            f"model is on a node of its own; give {stages} nodes, or lower it"
        )
    if not gpus:
        if stages > 1:
            raise SetupError(
                f"--cluster.pipeline-parallel-size {stages} does not fit --deploy.gpus-per-node 0: only GPUs share a "
                "model layer by layer; leave it out, or give GPUs"
            )
        return
    if stages > 1 and deploy.gpus_per_node % gpus:
        raise SetupError(
            f"--engine.tensor-parallel-size {gpus} does not fit --deploy.gpus-per-node {deploy.gpus_per_node}: with "
            "--cluster.pipeline-parallel-size a node's GPUs have to be a multiple of it; give another number of either"
        )
    fit = deploy.nodes * (deploy.gpus_per_node // gpus) // stages
    wanted, option = most_replicas(settings)
    if wanted > fit:
        raise SetupError(
            f"{option} {wanted} does not fit --deploy.nodes {deploy.nodes} with --deploy.gpus-per-node "
            f"{deploy.gpus_per_node}: a replica takes {gpus} GPU(s) of {stages} node(s), so {fit} fit; ask for at most "
            f"that, or give {-(-wanted * stages // (deploy.gpus_per_node // gpus))} nodes"
        )
    if cluster.surge and cluster.replicas + 1 > fit:
        raise SetupError(
            f"--cluster.surge does not fit --deploy.nodes {deploy.nodes}: a rollout needs room for "
            f"{cluster.replicas + 1} replicas and there is room for {fit}; leave it out, or give more nodes"
        )


def _grace(settings: Settings, *, several: bool) -> int:
    drain, option = (
        (settings.cluster.drain_s, "cluster.drain-s") if several else (settings.drain_timeout, "drain-timeout")
    )
    needed = int(drain) + STOP_MARGIN_S
    asked = settings.deploy.grace_period_s
    if asked is not None and asked < needed:
        raise SetupError(
            f"--{option} {drain:g} does not fit --deploy.grace-period-s {asked}: streams that may still run would be "
            f"killed; set the second to at least {needed}, or the first to at most {max(asked - STOP_MARGIN_S, 0)}"
        )
    return asked or needed
