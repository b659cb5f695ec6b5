"""What an engine's `/metrics` tells of its work, by vLLM's own series."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from synthia_vllm.metrics.replicas import read_page

_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_GENERATED, _PROMPT = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
# Both are told when a request ends.
_ENDED_PROMPT, _ENDED_PREFILL_S = "vllm:request_prompt_tokens_sum", "vllm:request_prefill_time_seconds_sum"
_CACHE_USAGE, _CACHE_CONFIG = "vllm:kv_cache_usage_perc", "vllm:cache_config_info"
# Our engines tell these (`synthia_vllm.engine.stat_logger`), plain vLLM does not.
_MAX_REQUESTS, _MAX_STEP = "synthia_max_num_seqs", "synthia_max_num_batched_tokens"
_READ = {
    _RUNNING,
    _WAITING,
    _GENERATED,
    _PROMPT,
    _ENDED_PROMPT,
    _ENDED_PREFILL_S,
    _CACHE_USAGE,
    _MAX_REQUESTS,
    _MAX_STEP,
}
_ENOUGH_TOKENS = 1000  # of prompts, that their time says how fast they are


class Counters(NamedTuple):
    """An engine's work at one moment."""

    requests: int  # running and waiting, of all who ask this engine
    # Another one after each step that did something: tokens generated, prompts finished, the part of the KV cache that
    # is used, which grows with each chunk of a long prompt.
    progress: tuple[float, ...]
    prefill_rate: float | None = None  # prompt tokens a second; less than it can where several were computed together
    cache_tokens: int | None = None  # that its KV cache holds
    max_requests: int | None = None  # that it runs at once (`max_num_seqs`)
    step_tokens: int | None = None  # that one step computes at most (`max_num_batched_tokens`)


async def ask_counters(url: str, session: aiohttp.ClientSession, headers: Mapping[str, str]) -> Counters | None:
    """An engine's counters; None where it tells none. Raises aiohttp's errors and TimeoutError."""
    try:
        return read_counters(await read_page(session, f"{url}/metrics", headers))
    except ValueError:
        return None


def read_counters(page: str) -> Counters | None:
    """The counters on a page in Prometheus' text format, summed over its engines; None where it has not those of vLLM.

    Only the lines that count are parsed: a whole page takes the library's parser milliseconds.
    """
    sums: dict[str, float] = defaultdict(float)
    config = []
    for line in page.splitlines():
        name = line[: line.find("{")] if "{" in line else line.partition(" ")[0]
        if name == _CACHE_CONFIG:
            config.append(line)
        elif name in _READ:
            try:
                sums[name] += float(line.rpartition(" ")[2])
            except ValueError:
                return None
    cache = _cache_tokens("\n".join(config))
    if _RUNNING not in sums or _GENERATED not in sums:
        return None if cache is None else Counters(0, (), cache_tokens=cache)
    prompt, seconds = sums[_ENDED_PROMPT], sums[_ENDED_PREFILL_S]
    return Counters(
        requests=int(sums[_RUNNING] + sums[_WAITING]),
        progress=(sums[_GENERATED], sums[_PROMPT], sums[_CACHE_USAGE]),
        prefill_rate=prompt / seconds if prompt >= _ENOUGH_TOKENS and seconds > 0 else None,
        cache_tokens=cache,
        max_requests=int(sums[_MAX_REQUESTS]) or None,
        step_tokens=int(sums[_MAX_STEP]) or None,
    )


def _cache_tokens(lines: str) -> int | None:
    try:
        samples = [sample for family in text_string_to_metric_families(lines + "\n") for sample in family.samples]
    except ValueError:
        return None
    sizes = [
        int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"])
        for sample in samples
        if sample.labels.get("num_gpu_blocks", "").isdecimal() and sample.labels.get("block_size", "").isdecimal()
    ]
    return sum(sizes) if sizes else None
