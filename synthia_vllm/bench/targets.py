"""The ratios that issue 6 expects on the 2-core CPU with the demo model, and whether a run meets them."""

from dataclasses import dataclass
from typing import Literal

from synthia_vllm.bench.estimates import Estimate
from synthia_vllm.bench.summary import Load, Summary

# Ours, theirs, streams, at least. Output throughput, pair by pair within a round.
TARGETS: tuple[tuple[str, str, int, float], ...] = (
    ("ours", "card", 64, 20.0),
    ("ours", "vllm-default", 64, 1.8),
    ("ours", "vllm-tuned", 64, 0.98),
    ("cluster", "ray-normal", 64, 1.25),
    ("ours", "llama.cpp", 32, 2.0),
    ("ours", "llama.cpp", 64, 2.0),
)
Verdict = Literal["met", "met, within noise", "missed, within noise", "missed", "not measured"]


@dataclass(frozen=True)
class Target:
    """`within noise` says that the interval reaches over the target to the other side."""

    ours: str
    theirs: str
    streams: int
    at_least: float
    ratio: Estimate | None

    @property
    def verdict(self) -> Verdict:
        if self.ratio is None:
            return "not measured"
        if self.ratio.value >= self.at_least:
            sure = self.ratio.low is not None and self.ratio.low >= self.at_least
            return "met" if sure else "met, within noise"
        sure = self.ratio.high is not None and self.ratio.high < self.at_least
        return "missed" if sure else "missed, within noise"


def targets(summary: Summary) -> list[Target]:
    """All of them, those not measured too; none for a run that was not to hold us against any of these peers."""
    peers = {theirs for _, theirs, _, _ in TARGETS}
    if not any(server.name in peers for server in summary.run.servers):
        return []
    return [
        Target(ours, theirs, streams, least, _ratio(summary, ours, theirs, streams))
        for ours, theirs, streams, least in TARGETS
    ]


def main_family(summary: Summary) -> str | None:
    """Of closed loops, the one that most servers were measured under: peers are held against each other there."""
    servers: dict[str, set[str]] = {}
    for load in summary.loads("closed"):
        servers.setdefault(load.family, set()).update(summary.servers(load))
    return max(servers, key=lambda family: len(servers[family]), default=None)


def _ratio(summary: Summary, ours: str, theirs: str, streams: int) -> Estimate | None:
    family = main_family(summary)
    load = next((x for x in summary.loads("closed") if x.family == family and x.streams == streams), None)
    return summary.ratio(ours, theirs, load) if isinstance(load, Load) else None
