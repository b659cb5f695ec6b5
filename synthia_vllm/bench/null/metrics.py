"""What the null engine's `/metrics` tells: vLLM 0.29's names, and lies on request."""

import asyncio

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.types import Send

from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.http import answer, error
from synthia_vllm.bench.null.queue import BLOCK, Queue

_LOOK_S = 0.05  # between two looks at whether a fault is over
_TIMES = (
    "time_to_first_token",
    "inter_token_latency",
    "e2e_request_latency",
    "request_queue_time",
    "request_prefill_time",
)


class Metrics:
    """Counts and times of one engine. `generated` is added to by who makes tokens.

    max_num_seqs    told as our own engines tell it; None: not told
    """

    def __init__(self, queue: Queue, faults: Faults, max_num_seqs: int | None = None) -> None:
        self.generated = 0
        self._queue, self._faults, self._max_num_seqs = queue, faults, max_num_seqs
        self._registry = CollectorRegistry()
        self._times = {
            name: Histogram(
                f"vllm:{name}_seconds", "As vLLM names it.", ["engine", "model_name"], registry=self._registry
            )
            for name in _TIMES
        }
        self._prompts = Histogram(
            "vllm:request_prompt_tokens", "As vLLM names it.", ["engine", "model_name"], registry=self._registry
        )
        self._still: tuple[float, ...] | None = None  # counters, while they stand still

    def observe(self, name: str, seconds: float) -> None:
        self._times[name].labels("0", "null").observe(seconds)

    def ended(self, prompt: int, prefill_s: float) -> None:
        """Counts a request at its end: vLLM adds what its prompt took, and how long that was, only then."""
        self._prompts.labels("0", "null").observe(prompt)
        self.observe("request_prefill_time", prefill_s)

    async def tell(self, send: Send) -> None:
        while self._faults.metrics == "hang":
            await asyncio.sleep(_LOOK_S)
        if self._faults.metrics == "error":
            return await answer(send, 500, error("a fault, as ordered", 500, "InternalServerError"))
        return await answer(send, 200, self.page().encode(), b"text/plain")

    def counters(self) -> tuple[float, ...]:
        """Tokens of prompts and of replies, and how full the cache is. Where they are to stand still, as at first."""
        queue = self._queue
        found = float(queue.prompt_tokens), float(self.generated), queue.told().blocks / queue.blocks
        still = self._faults.stuck or self._faults.metrics == "still"
        self._still = (self._still or found) if still else None
        return self._still or found

    def page(self) -> str:
        labels = 'engine="0",model_name="null"'
        cache = f'block_size="{BLOCK}",engine="0",num_gpu_blocks="{self._queue.blocks}"'
        told = self._queue.told()
        prompt_tokens, generated, usage = self.counters()
        series = [
            ("vllm:cache_config_info", "gauge", cache, 1.0),
            ("vllm:num_requests_running", "gauge", labels, float(told.running)),
            ("vllm:num_requests_waiting", "gauge", labels, float(told.waiting)),
            ("vllm:kv_cache_usage_perc", "gauge", labels, usage),
            ("vllm:num_preemptions_total", "counter", labels, 0.0),
            ("vllm:prompt_tokens_total", "counter", labels, prompt_tokens),
            ("vllm:generation_tokens_total", "counter", labels, generated),
            ("vllm:prefix_cache_queries_total", "counter", labels, prompt_tokens),
            ("vllm:prefix_cache_hits_total", "counter", labels, 0.0),
        ]
        if self._max_num_seqs is not None:
            series.append(("synthia_max_num_seqs", "gauge", labels, float(self._max_num_seqs)))
        return generate_latest(self._registry).decode() + "".join(
            f"# HELP {name} As the engine names it.\n# TYPE {name} {kind}\n{name}{{{labels}}} {value}\n"
            for name, kind, labels, value in series
        )
