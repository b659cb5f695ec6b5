"""What a run says in a few sentences: where ours is behind first, then what won, by how much and how sure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log

from synthia_vllm.bench.compare import TOLERANCE
from synthia_vllm.bench.compare import Verdict as Side
from synthia_vllm.bench.compare import verdict as side_of
from synthia_vllm.bench.estimates import ENOUGH, Estimate
from synthia_vllm.bench.groups import GROUPS
from synthia_vllm.bench.summary import METRICS, Load, Summary

_LATENCY = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
# An open loop's throughput is the rate at which it sends.
_JUDGED: Mapping[str, Sequence[str]] = {"closed": ("output_throughput", *_LATENCY)}
_TOLD = 4  # figures of one peer in a sentence


@dataclass(frozen=True)
class Finding:
    """One figure of ours against a peer's, pair by pair within a round."""

    ours: str
    theirs: str
    load: Load
    metric: str
    ratio: Estimate
    side: Side

    def text(self) -> str:
        """`ITL p50 1.31 (1.25 to 1.40) times theirs, closed loop, 8 streams`."""
        ratio = self.ratio.text(2 if self.ratio.value >= 0.1 else 3)
        alone = " (one round)" if self.ratio.rounds == 1 else ""
        return f"{METRICS[self.metric][0]} {ratio}{alone} times theirs, {self.load}"


@dataclass(frozen=True)
class Verdict:
    """One peer: in `behind` and `ahead` throughput comes first, then what differs most."""

    ours: str
    theirs: str
    behind: list[Finding]
    level: list[Finding]
    ahead: list[Finding]

    @property
    def findings(self) -> list[Finding]:
        """Of all three sides."""
        return [*self.behind, *self.level, *self.ahead]

    @property
    def count(self) -> int:
        return len(self.findings)

    def told(self, side: str) -> str:
        """The first few of a side, in words."""
        found: list[Finding] = getattr(self, side)
        more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        return "; ".join(finding.text() for finding in found[:_TOLD]) + more


def verdicts(summary: Summary) -> list[Verdict]:
    """Of each peer that ours was measured beside, those that ours is behind of first."""
    found = _findings(summary)
    made = []
    for (ours, theirs), group in groupby(found, lambda finding: (finding.ours, finding.theirs)):
        own = list(group)
        behind, level, ahead = ([f for f in own if f.side == side] for side in ("worse", "same", "better"))
        made.append(Verdict(ours, theirs, sorted(behind, key=_weight), level, sorted(ahead, key=_weight)))
    return sorted(made, key=lambda verdict: -len(verdict.behind) / verdict.count)


def winners(summary: Summary) -> list[str]:
    """Who made most tokens a second under the closed loop of most streams, of each group; one sentence each."""
    sentences = []
    for members in groups(summary):
        loads = [x for x in summary.loads("closed") if sum((name, x) in summary.cells for name in members) > 1]
        if not loads:
            continue
        load = max(loads, key=lambda x: (sum((name, x) in summary.cells for name in members), x.streams or 0))
        found = {name: summary.estimate(name, load, "output_throughput") for name in members}
        known = {name: value for name, value in found.items() if value is not None and value.value > 0}
        order = sorted(known, key=lambda name: -known[name].value)
        if len(order) < 2:
            continue
        first, second = order[:2]
        ratio = summary.judged(first, second, load, "output_throughput", len(order))
        if ratio is None:
            continue
        most = f"{known[first].text(0)} tokens a second, {load}"
        if side_of(ratio, True, TOLERANCE) == "better":
            sentences.append(
                f"{summary.title(first)} made most of {len(order)}: {most}; "
                f"{ratio.text()} times the next, {summary.title(second)}."
            )
        else:
            sentences.append(
                f"{summary.title(first)} and {summary.title(second)} are level as the first of {len(order)}: {most}; "
                f"{ratio.text()} times."
            )
    return sentences


def in_short(summary: Summary) -> list[str]:
    """A sentence for each peer that ours is behind of, then what won, then how sure that is."""
    found = verdicts(summary)
    behind = [
        f"{summary.title(one.ours)} is behind {summary.title(one.theirs)}: {one.told('behind')}."
        for one in found
        if one.behind
    ]
    return [sentence for sentence in (*behind, *winners(summary), sureness(found)) if sentence]


def sureness(found: Sequence[Verdict]) -> str:
    """What the brackets are, and when a difference counts."""
    rounds = [finding.ratio.rounds for one in found for finding in one.findings]
    if not rounds:
        return ""
    some = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    told = f"Ratios are medians of {some} round{'s' * (max(rounds) > 1)}, pair by pair. "
    if min(rounds) < ENOUGH:
        told += "Round brackets: the least and the greatest of fewer than six rounds, no interval. "
    if max(rounds) >= ENOUGH:
        told += f"Square brackets: the interval that holds for all {len(rounds)} together in 99 % of the cases. "
    share = f"{TOLERANCE:.0%}".replace("%", " %")
    return told + f"A difference counts where all of that lies beyond {share} (of fewer than four rounds beyond more)."


def groups(summary: Summary) -> list[list[str]]:
    """The servers that were measured beside each other, ours last in each; those that no group has are one."""
    present = summary.servers()
    if len(present) < 2:
        return []
    found = [[name for name in members if name in present] for members in GROUPS.values()]
    rest = [name for name in present if not any(name in members for members in GROUPS.values())]
    return [members for members in (*found, rest) if len(members) > 1]


def _findings(summary: Summary) -> list[Finding]:
    asked = [
        (members[-1], theirs, load, metric)
        for members in groups(summary)
        for theirs in members[:-1]
        for load in summary.loads()
        if {(members[-1], load), (theirs, load)} <= summary.cells.keys()
        for metric in _JUDGED.get(load.kind, _LATENCY)
    ]
    found = []
    for ours, theirs, load, metric in asked:
        ratio = summary.judged(ours, theirs, load, metric, len(asked))
        if ratio is not None:
            side = side_of(ratio, METRICS[metric][3], TOLERANCE)
            found.append(Finding(ours, theirs, load, metric, ratio, side))
    return found


def _weight(finding: Finding) -> tuple[bool, float]:
    """Throughput first, then by how many times the better is better."""
    value = finding.ratio.value
    return finding.metric != "output_throughput", -abs(log(value)) if value > 0 else float("-inf")
