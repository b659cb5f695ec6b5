"""What this machine has, found without importing torch."""

import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
# vLLM's: the CPUs that its worker computes on, or "auto".
CPU_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_CGROUPS = Path("/sys/fs/cgroup")  # in a container its own


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; memory in bytes."""

    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True)
class Machine:
    """CPUs that this process is to use, memory in bytes, GPUs.

    half_precision  its CPUs compute with 16-bit numbers about as fast as with 32-bit ones
    """

    cpus: int
    memory_total: int
    memory_available: int
    gpus: tuple[Gpu, ...]
    half_precision: bool = True


def inspect_machine() -> Machine:
    """Looks at the machine: affinity mask and memory (the container's limits if lower), nvidia-smi."""
    memory = psutil.virtual_memory()
    limit = memory_limit()
    total = min(memory.total, limit) if limit else memory.total
    return Machine(
        cpus=len(usable_cpus()),
        memory_total=total,
        memory_available=min(memory.available, total, _node_available() or total),
        gpus=_gpus(),
        half_precision=computes_in_half_precision(),
    )


def computes_in_half_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 without taking them apart first: on x86 from AVX-512 on."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return True
    return flags is None or "avx512f" in flags[1].split()


def usable_cpus(process: int = 0) -> set[int]:
    """The CPUs that a process, by default this one, is to compute on: its affinity mask, within the quota."""
    known = hasattr(os, "sched_getaffinity")
    return within_quota(os.sched_getaffinity(process) if known else set(range(os.cpu_count() or 1)), cpu_quota())


def within_quota(cpus: Set[int], quota: float | None) -> set[int]:
    """Of these CPUs as many as a container's quota lasts for, each on a core of its own; all of them without one.

    Threads on more of them use the quota up before the period ends, and the whole container then stands still until
    the next one. Which ones follows from the host's name: containers on one machine should not all take the first.
    """
    cores = physical_cores(cpus)
    count = max(1, int(quota)) if quota is not None else len(cores)
    if count >= len(cores):
        return set(cpus)
    start = zlib.crc32(socket.gethostname().encode()) % (len(cores) // count) * count
    return set(cores[start : start + count])


def cpu_quota(cgroups: Path = _CGROUPS) -> float | None:
    """CPUs' worth of time that this container gets in each period; None without a limit. cgroup v2, else v1."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    # No limit is `max` in v2 and -1 in v1.
    return int(quota) / int(period) if quota.strip().isdigit() else None


def physical_cores(allowed: Iterable[int]) -> list[int]:
    """One CPU id for each core of these. Two threads of one core only get in each other's way."""
    return sorted({core_of(cpu): cpu for cpu in sorted(allowed)}.values())


def core_of(cpu: int) -> str:
    """What the CPUs of one core have in common."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def preload_libraries() -> dict[str, Path | None]:
    """The libraries that make vLLM's CPU worker fast, and where they are; None for one that is missing.

    tcmalloc is Debian's `libtcmalloc-minimal4`; libiomp5 comes with `intel-openmp` into the environment.
    """
    folders = [
        Path("/usr/lib/x86_64-linux-gnu"),
        Path("/usr/lib/aarch64-linux-gnu"),
        Path("/usr/lib64"),
        Path("/usr/lib"),
    ]
    tcmalloc = next((found for folder in folders for found in sorted(folder.glob("libtcmalloc_minimal.so*"))), None)
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    return {"tcmalloc": tcmalloc, "libiomp5": openmp if openmp.exists() else None}


def _gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    if not command:
        return ()
    query = [command, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ()  # a driver that does not answer can't serve either
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = []
    for row in rows.strip().splitlines():
        name, total, free = (cell.strip() for cell in row.rsplit(",", 2))
        gpus.append(Gpu(name, int(total) * 2**20, int(free) * 2**20))
    if visible is not None:
        wanted = [part for part in visible.split(",") if part.strip().isdigit()]
        gpus = [gpus[int(part)] for part in wanted if int(part) < len(gpus)]
    return tuple(gpus)


def _node_available() -> int | None:
    """Free memory of the NUMA node of our first CPU: what vLLM's CPU worker allows itself for the KV cache.

    Source: vLLM 0.29, `utils/cpu_resource_utils.get_memory_node_info`.
    """
    first = min(usable_cpus())
    node = next(Path(f"/sys/devices/system/cpu/cpu{first}").glob("node*"), None)
    try:
        lines = Path("/sys/devices/system/node", node.name if node else "node0", "meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {words[2].rstrip(":"): int(words[3]) * 1024 for words in map(str.split, lines)}
    return sum(sizes[name] for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))


def memory_limit(cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that this container may have; None without a limit. cgroup v2, else v1."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroups / name).read_text().strip()
        except OSError:
            continue
        # No limit is `max` in v2, and in v1 the largest number of pages that there may be.
        return int(text) if text.isdigit() and int(text) < 2**62 else None
    return None
