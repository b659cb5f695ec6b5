"""What this machine can do, what a token needs, and so how fast a server could be (Williams et al., *Roofline*, 2009).

A decode step reads all weights once, whatever the batch, and the KV cache of each sequence. A token costs two
operations a weight. The bound at a batch size is the slower of the two.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthia_vllm.bench.run_file import Roofline
from synthia_vllm.bench.summary import Load, Summary, tokens_of

if TYPE_CHECKING:
    import torch

# Each of three; the caches of one machine are far smaller together. A GPU reads the small ones in the time it takes to
# be asked to.
_ARRAY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
_MATRIX = {"cpu": 2048, "cuda": 8192}
_SECONDS = 1.5  # for each measurement; the best repeat counts, as in STREAM
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Needs:
    """Of a Llama-architecture model, from its config.json."""

    weight_bytes: int  # read by each step: all matrices, the output layer among them
    kv_bytes_per_token: int
    flops_per_token: float


@dataclass(frozen=True)
class Point:
    """One server at one number of streams, against the bound there."""

    server: str
    batch: int
    tokens_s: float
    bound: float

    @property
    def share(self) -> float:
        return self.tokens_s / self.bound


def needs(config: Mapping[str, Any], dtype: str = "bfloat16") -> Needs:
    """The input embedding is looked up, not multiplied with; tied, the same matrix is the output layer."""
    size = _DTYPE_BYTES[dtype]
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * int(config["intermediate_size"])
    weights = int(config["num_hidden_layers"]) * layer + hidden * int(config["vocab_size"])
    return Needs(
        weight_bytes=weights * size,
        kv_bytes_per_token=2 * int(config["num_hidden_layers"]) * kv_heads * head * size,
        flops_per_token=2.0 * weights,
    )


def measure(model: Path) -> Roofline:
    """Of this machine's CPUs, or its first GPU, with all cores. Takes about ten seconds and 800 MB, or 6 GB of a GPU.

    `model` is a folder with a config.json. Raises ValueError where it holds none of the Llama architecture.
    """
    import torch

    try:
        config = json.loads((model / "config.json").read_text())
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        needed = needs(config, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model}: no config.json of a Llama-architecture model: {error!r}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    triad, read = _triad(device), _read(device)
    rates = {name: _matrix_rate(device, getattr(torch, name)) for name in dict.fromkeys((dtype, "bfloat16", "float32"))}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Roofline(
        bandwidth_bytes_s=max(triad, read),
        matrix_flops_s=rates[dtype],
        dtype=dtype,
        weight_bytes=needed.weight_bytes,
        kv_bytes_per_token=needed.kv_bytes_per_token,
        flops_per_token=needed.flops_per_token,
        notes=[
            f"measured on {where}",
            f"memory bandwidth: triad a = b + s*c {triad / 1e9:.1f} GB/s, reading alone {read / 1e9:.1f} GB/s; "
            "the higher counts",
            *(
                f"matrix product of {_MATRIX[device.type]} x {_MATRIX[device.type]}, {name}: {rate / 1e9:.0f} GFLOP/s"
                for name, rate in rates.items()
            ),
        ],
    )


def bound(roofline: Roofline, batch: float, context_tokens: float = 0.0) -> float:
    """Tokens a second of all sequences together, each with so many tokens in its KV cache."""
    bytes_read = roofline.weight_bytes + batch * context_tokens * roofline.kv_bytes_per_token
    seconds = max(bytes_read / roofline.bandwidth_bytes_s, batch * roofline.flops_per_token / roofline.matrix_flops_s)
    return batch / seconds


def points(summary: Summary, load_family: str | None = None) -> list[Point]:
    """Each server in the closed loops, against the bound with the context that its requests had on average."""
    roofline = summary.run.roofline
    if roofline is None:
        return []
    found = []
    for load in summary.loads("closed"):
        if load.streams is None or (load_family is not None and load.family != load_family):
            continue
        for server in summary.servers(load):
            estimate = summary.estimate(server, load, "output_throughput")
            if estimate is not None and not math.isnan(estimate.value):
                limit = bound(roofline, load.streams, mean_context(summary, server, load))
                found.append(Point(server, load.streams, estimate.value, limit))
    return found


def mean_context(summary: Summary, server: str, load: Load) -> float:
    """Tokens in a sequence's cache, over its reply: the prompt and half of what it generates."""
    requests = [r for m in summary.measurements(server, load) for r in m.requests if r.error is None]
    return sum(r.prompt_tokens + tokens_of(r) / 2 for r in requests) / len(requests) if requests else 0.0


def _triad(device: "torch.device") -> float:
    import torch

    size = _ARRAY_BYTES[device.type]
    a, b, c = (torch.full((size // 4,), float(n), device=device) for n in range(3))
    return 3 * size / _best(lambda: torch.add(b, c, alpha=3.0, out=a), device)


def _read(device: "torch.device") -> float:
    import torch

    size = _ARRAY_BYTES[device.type]
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _best(lambda: torch.dot(a, b), device)


def _matrix_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch

    size = _MATRIX[device.type]
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: torch.matmul(one, other), device)


def _best(work: Callable[[], object], device: "torch.device") -> float:
    """Seconds of the fastest repeat; the first warms up."""
    import torch

    best, end, first = math.inf, time.perf_counter() + _SECONDS, True
    while first or best == math.inf or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not first:
            best = min(best, time.perf_counter() - begin)
        first = False
    return best
