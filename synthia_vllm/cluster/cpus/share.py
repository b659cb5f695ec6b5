"""How replicas divide a machine that has no GPU."""

import math
from dataclasses import dataclass

from synthia_vllm.engine.hardware import GIB, Machine, physical_cores, usable_cpus
from synthia_vllm.settings import Settings

# Ray's own processes, the gateways, and what the system needs.
_RESERVED_BYTES = 4 * GIB


@dataclass(frozen=True)
class Share:
    """One replica's part: CPU ids as vLLM's VLLM_CPU_OMP_THREADS_BIND takes them, memory in bytes."""

    cpus: str
    memory: int


def share_of(machine: Machine, rank: int, replicas: int, nodes: int, settings: Settings) -> Share:
    """The share of the replica with this rank on its machine, where so many replicas run on so many machines.

    The number of replicas is that of the moment when the replica starts: those that were there before keep theirs
    until they start anew. With `cpus_per_replica` shares are of that size, and a machine holds as many as fit.
    """
    cores = physical_cores(usable_cpus())
    here = max(1, math.ceil(replicas / max(1, nodes)))
    width = len(cores) // here
    if settings.cluster.cpus_per_replica is not None:
        width = max(1, int(settings.cluster.cpus_per_replica))
        here = max(1, len(cores) // width)
    memory = max(0, machine.memory_total - _RESERVED_BYTES) // here
    if here == 1:
        return Share("auto", memory)
    if width == 0:  # more replicas than cores: they take turns
        return Share(str(cores[rank % len(cores)]), memory)
    start = rank % here * width
    return Share(",".join(map(str, cores[start : start + width])), memory)
