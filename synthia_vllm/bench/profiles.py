"""What `bench run` measures: `quick` for a look, `full` for figures to quote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from synthia_vllm.bench.conversations import Conversations
from synthia_vllm.bench.groups import GROUPS, Group
from synthia_vllm.bench.measuring import Workload
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.users import Population, Users
from synthia_vllm.bench.workloads import ClosedLoop, OpenLoop

STREAMS = (1, 8, 32, 64)
GATEWAY_STREAMS = (1, 8, 64, 256)
_SPREAD_S = 1.0
# Lengths of the loads by which servers are compared, in tokens.
PROMPT, OUTPUT = Span(32, 32), Span(64, 64)
# The peers that answer like ours does, so that open loops and the rest say something about our layers.
NEAREST = ("vllm-tuned", "ours")
STEADY = Population(name="steady", rate=1, prompt_tokens=PROMPT, output_tokens=Span(16, 16))
# More than the engine runs at once (vLLM on a CPU: 128), so that there is a queue to be fair in.
AGGRESSOR = Population(name="aggressor", streams=192, prompt_tokens=PROMPT, output_tokens=OUTPUT)
USERS: Mapping[str, float] = {STEADY.name: STEADY.weight, AGGRESSOR.name: AGGRESSOR.weight}


@dataclass(frozen=True)
class Part:
    """A workload, on all servers of the group or on these, in all rounds or in the first few."""

    workload: Workload
    servers: Sequence[str] | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Profile:
    """`minutes` is what a run may take in all: rounds that would not end in time are not begun.

    limit_s   of a closed loop on the card's script: what is under way then is left out
    """

    name: str
    minutes: float
    rounds: int
    limit_s: float
    parts: Mapping[Group, Sequence[Part]]


def quick(asked: Sequence[int] | None = None, rates: Sequence[float] = (2, 5)) -> Profile:
    """20 minutes on 2 cores. `asked`: streams of the closed loops."""
    streams = asked or STREAMS
    machine = [
        Part(closed(count, waves=1), without_card(count, streams), None if count >= 32 else 1) for count in streams
    ]
    machine += [Part(OpenLoop(rate, 12, PROMPT, OUTPUT), NEAREST, 1) for rate in rates]
    machine += [
        Part(OpenLoop(rates[0], 12, PROMPT, OUTPUT, burstiness=0.25), NEAREST, 1),
        Part(Conversations(8, 3, 2.0, 30, Span(24, 24)), NEAREST, 1),
        Part(Users((STEADY,), 10, label="users: steady alone"), NEAREST, 1),
        Part(Users((STEADY, AGGRESSOR), 15, label="users: steady beside an aggressor"), NEAREST, 1),
    ]
    cluster = [Part(closed(count, waves=1)) for count in streams if count >= 32 or count == max(streams)]
    gateways = [Part(chats(count, waves=2, least=8)) for count in asked or GATEWAY_STREAMS]
    return Profile("quick", 20, 3, 10, {"machine": machine, "cluster": cluster, "gateways": gateways})


def full(asked: Sequence[int] | None = None, rates: Sequence[float] = (1, 2, 4, 6, 8)) -> Profile:
    """90 minutes on 2 cores. `asked`: streams of the closed loops."""
    streams = asked or STREAMS
    near = ("vllm-default", *NEAREST)
    machine = [Part(closed(count), without_card(count, streams)) for count in streams]
    # Twice: the sizing's simulator is held against their p99.
    machine += [Part(OpenLoop(rate, 60, PROMPT, OUTPUT), NEAREST, 2) for rate in rates]
    machine += [
        Part(OpenLoop(rates[len(rates) // 2], 60, PROMPT, OUTPUT, burstiness=0.25), NEAREST, 1),
        Part(Conversations(16, 5, 3.0, 30, Span(32, 32)), near, 1),
        Part(ClosedLoop(8, 16, Span(900, 900), Span(8, 8), "long prompt, short answer"), ("llama.cpp", *near), 2),
        Part(ClosedLoop(8, 8, Span(16, 16), Span(512, 512), "short prompt, long answer"), ("llama.cpp", *near), 2),
        Part(Users((STEADY,), 30, label="users: steady alone"), NEAREST, 1),
        Part(Users((STEADY, AGGRESSOR), 45, label="users: steady beside an aggressor"), NEAREST, 1),
    ]
    cluster = [Part(closed(count)) for count in streams]
    cluster += [
        Part(OpenLoop(rates[len(rates) // 2], 60, PROMPT, OUTPUT), None, 1),
        Part(Conversations(16, 5, 3.0, 30, Span(32, 32)), ("ray-direct", "cluster"), 2),
    ]
    gateways = [Part(chats(count, waves=4, least=32)) for count in asked or GATEWAY_STREAMS]
    return Profile("full", 90, 5, 30, {"machine": machine, "cluster": cluster, "gateways": gateways})


PROFILES = {"quick": quick, "full": full}


def closed(streams: int, waves: int = 2) -> ClosedLoop:
    """So many requests for each stream, at least four in all."""
    return ClosedLoop(streams, max(4, waves * streams), PROMPT, OUTPUT)


def chats(streams: int, *, waves: int, least: int) -> ClosedLoop:
    """So many requests for each stream, and at least so many in all.

    The streams begin one after the other: all at once they would wait for the client, and TTFT would be of that.
    """
    requests = max(least, waves * streams)
    return ClosedLoop(streams, requests, PROMPT, OUTPUT, label="chats", chat=True, spread_s=_SPREAD_S)


def chats_at_once(parts: Sequence[Part]) -> ClosedLoop:
    """As many as there will be at most, before anything is counted."""
    most = max((part.workload.streams or 1 for part in parts), default=1)
    return ClosedLoop(most, most, PROMPT, Span(8, 8), "warm-up", chat=True)


def without_card(count: int, streams: Sequence[int]) -> Sequence[str] | None:
    """The card's script takes one request at a time: with the fewest and the most streams all is said of it."""
    if count in (min(streams), max(streams)):
        return None
    return [name for name in GROUPS["machine"] if name != "card"]
