"""Names and titles of the servers that one run holds against each other, by group; how they start is in `peers`."""

from collections.abc import Mapping
from typing import Literal

from synthia_vllm.bench.rivals import DIRECT, GATEWAY, RIVALS

Group = Literal["machine", "cluster", "gateways"]

TITLES: Mapping[str, str] = {
    "card": "the card's script, one request at a time",
    "card-batched": "the card's script, batched",
    "vllm-default": "vLLM's server as started by default",
    "vllm-tuned": "vLLM's server with our tuning",
    "llama.cpp": "llama.cpp's server (Q4_1 weights)",
    "ours": "synthia-vllm serve",
    "ray-normal": "Ray Serve LLM, normal ingress",
    "ray-direct": "Ray Serve LLM, direct streaming",
    "cluster": "synthia-vllm cluster",
    DIRECT: "vLLM's server, no gateway",
    **{rival.name: rival.title for rival in RIVALS},
    GATEWAY: "synthia-vllm gateway (keys, limits, fairness)",
}
# Ours is the last of each.
GROUPS: Mapping[Group, tuple[str, ...]] = {
    "machine": ("card", "card-batched", "vllm-default", "vllm-tuned", "llama.cpp", "ours"),
    "cluster": ("ray-normal", "ray-direct", "cluster"),
    "gateways": (DIRECT, *(rival.name for rival in RIVALS), GATEWAY),
}
OURS = tuple(members[-1] for members in GROUPS.values())
