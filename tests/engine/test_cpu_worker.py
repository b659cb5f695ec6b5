"""The threads of the worker, in a process of its own with the real OpenMP libraries. Seeds: `tests/e2e`."""

import json
import os
import subprocess
import sys

import pytest

from synthia_vllm.engine.hardware import preload_libraries

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
CODE = """
import json, os, sys
from types import SimpleNamespace
import torch
from synthia_vllm.engine.cpu_worker import Worker

torch.set_num_threads = lambda count: None  # as vLLM leaves it
worker, seen = Worker.__new__(Worker), []
worker.model_runner = SimpleNamespace(get_model=torch.nn.Module)
for cpus in json.loads(sys.argv[1]):
    worker.compute_on(cpus)
    torch.ones(1 << 20).sum()
    seen.append((torch.get_num_threads(), worker.computes_on()))
print(json.dumps(seen))
"""


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs and Linux")
@pytest.mark.parametrize("preloaded", [True, False])
def test_the_number_of_threads_changes(preloaded: bool) -> None:
    one, two = CPUS[:2]
    wanted = [[one], [one, two], [two], [two, one]]
    library = str(preload_libraries().get("libiomp5") or "")
    if preloaded and not library:
        pytest.skip("no Intel OpenMP here")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LD_PRELOAD": library if preloaded else ""}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(wanted)], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[len(cpus), cpus] for cpus in wanted]
