"""The machine that figures are of."""

import platform
import re
from pathlib import Path
from typing import Any

from synthia_vllm.engine.hardware import inspect_machine


def machine() -> dict[str, Any]:
    """Names its processor, GPUs, cores and memory (GiB), as results keep them."""
    found = inspect_machine()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cpus": found.cpus,
        "memory_gib": round(found.memory_total / 2**30, 1),
        "gpus": [gpu.name for gpu in found.gpus],
        "python": platform.python_version(),
    }
