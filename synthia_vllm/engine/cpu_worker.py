"""vLLM's worker for machines without a GPU, with two things that it lacks; given to vLLM as its `--worker-cls`.

Checked on vLLM 0.29.0.

- A request with a seed whose prompt takes more than one step ends vLLM's engine on a CPU: what was drawn for a token
  that is not wanted yet is taken back by the generator's offset, and only generators of GPUs have one
  (`GPUModelRunner._bookkeeping_sync`). Here the generator's state is kept instead.
- The number of threads is fixed at the start. Here it can change: replicas that share a machine come and go.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

# What vLLM keeps of oneDNN's for matrices of one shape.
_PREPARED = 32


class _Runner(CPUModelRunner):  # type: ignore[misc]
    """Discards the tokens of unfinished prompts without a trace in the generators of their requests."""

    def _sample(self, *given: Any, **named: Any) -> Any:
        states = {index: generator.get_state() for index, generator in self._of_unfinished_prompts().items()}
        drawn = super()._sample(*given, **named)
        for index, state in states.items():
            self.input_batch.generators[index].set_state(state)
        return drawn

    def _bookkeeping_sync(self, *given: Any, **named: Any) -> Any:
        generators = self.input_batch.generators
        kept = {index: generators.pop(index) for index in self._of_unfinished_prompts()}
        try:
            return super()._bookkeeping_sync(*given, **named)
        finally:
            generators.update(kept)

    def _of_unfinished_prompts(self) -> dict[int, torch.Generator]:
        """Generators, by place in the batch, of the requests whose prompt this step does not end."""
        unfinished = self.discard_request_mask.np
        return {i: generator for i, generator in self.input_batch.generators.items() if unfinished[i]}


class Worker(CPUWorker):  # type: ignore[misc]
    def init_device(self) -> None:
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:  # it is made in the middle of what super() does
            self.model_runner.__class__ = _Runner

    def compute_on(self, cpus: Sequence[int]) -> None:
        """From the next step on, computes with one thread on each of these CPUs. For vLLM's `collective_rpc`.

        As vLLM did itself while it still bound its threads in `csrc/cpu/utils.cpp`. Threads that are not wanted for now
        sleep.
        """
        torch._C.set_num_threads(len(cpus))  # vLLM has replaced torch.set_num_threads by one that does nothing
        _on_each_thread(lambda number: os.sched_setaffinity(0, {cpus[number]}))
        _prepare_again(self.model_runner.get_model())

    def computes_on(self) -> list[int]:
        """A CPU for each thread, the first one's first."""
        found: dict[int, int] = {}
        _on_each_thread(lambda number: found.update({number: min(os.sched_getaffinity(0))}))
        return [found[number] for number in sorted(found)]


def _prepare_again(model: torch.nn.Module) -> None:
    """Has oneDNN divide its matrix products by the number of threads that there is now.

    vLLM keeps what oneDNN has prepared for the last so many numbers of rows, for all layers of the same shape
    together (`DNNLPrimitiveCache`, a size of 32 from `dispatch_cpu_unquantized_gemm`), and divided as it was then. So
    many others push them out. Takes 50 ms for a small model, later less: oneDNN has a cache of its own, by threads.
    """
    one_of_each = {
        (layer.input_size_per_partition, layer.output_size_per_partition): layer
        for layer in model.modules()
        if hasattr(layer, "cpu_linear") and hasattr(layer, "input_size_per_partition")
    }
    for (width, _), layer in one_of_each.items():
        for rows in range(1, _PREPARED + 1):
            layer.cpu_linear(torch.zeros(rows, width, dtype=layer.params_dtype), layer.weight, None)


def _on_each_thread(do: Callable[[int], None]) -> None:
    """Calls this with its number on each thread that torch computes with when this one asks it to."""
    openmp = _openmp()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: do(openmp.omp_get_thread_num()))
    openmp.GOMP_parallel(function, None, torch.get_num_threads(), 0)


def _openmp() -> ctypes.CDLL:
    """The OpenMP that torch runs on: a preloaded one (Intel's knows GNU's names), else the one that torch brings."""
    loaded = ctypes.CDLL(None)
    return loaded if hasattr(loaded, "GOMP_parallel") else ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")
