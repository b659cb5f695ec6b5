"""Ours and plain vLLM in bf16 and in FP8, and the card's script: throughput, latency, goodput, start, memory."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.goodput import Objective, goodput
from benchmarks.gpu.servers import FP8, Bench, Variant, serving
from benchmarks.load.interleaving import run_rounds, warm_up
from benchmarks.load.measuring import Terms
from benchmarks.load.peers import Say, Up
from benchmarks.load.profiles import Part
from benchmarks.load.prompts import Span
from benchmarks.load.records import Recorder
from benchmarks.load.run_file import Measurement
from benchmarks.load.summary import Slo
from benchmarks.load.terminal import line
from benchmarks.load.workloads import ClosedLoop

OURS = Variant("ours", "synthia-vllm serve, bf16", "ours")
VLLM = Variant("vllm", "vLLM's server with the same options, bf16", "vllm")
OURS_FP8 = Variant("ours-fp8", "synthia-vllm serve, FP8", "ours", FP8)
VLLM_FP8 = Variant("vllm-fp8", "vLLM's server with the same options, FP8", "vllm", FP8)
CARD = Variant("card", "the card's script, one request at a time", "card", path="/single")
CARD_BATCHED = Variant("card-batched", "the card's script, batched", "card", path="/batched")
STREAMS = (1, 8, 32, 64, 128, 256)
# A stage's rounds are numbered from here on: ratios are taken within a round, and so within a stage.
STAGE_ROUNDS = 100


@dataclass(frozen=True)
class Stage:
    """Servers that run at once. `goodput`: also find the rate at which their SLO breaks."""

    variants: Sequence[Variant]
    streams: Sequence[int]
    goodput: bool


@dataclass(frozen=True)
class Loads:
    """What is sent: closed loops of these streams, and the open loops of the objective."""

    streams: Sequence[int] = STREAMS
    rounds: int = 3
    prompt: Span = Span(128, 128)  # noqa: RUF009
    output: Span = Span(128, 128)  # noqa: RUF009
    limit_s: float = 60.0
    objective: Objective = Objective()  # noqa: RUF009


def stages(streams: Sequence[int]) -> list[Stage]:
    """Pairs first, each with the GPU to itself; then ours against the card's script, and FP8 against bf16."""
    few = sorted({1, 64} & set(streams)) or [min(streams)]
    return [
        Stage((OURS, VLLM), streams, goodput=True),
        Stage((OURS_FP8, VLLM_FP8), streams, goodput=True),
        Stage((CARD, CARD_BATCHED, OURS, OURS_FP8), few, goodput=False),
    ]


def measure_all(bench: Bench, loads: Loads, recorder: Recorder, logs: Path, say: Say) -> dict[str, float]:
    """Runs all stages; measurements go to the recorder as they come. Returns each server's goodput, requests/s."""
    found: dict[str, float] = {}
    for number, stage in enumerate(stages(loads.streams)):
        with serving(bench, stage.variants, logs, say) as servers:
            recorder.take_servers([up.server for up in servers])
            if sum(up.target is not None for up in servers) > 0:
                asyncio.run(_stage(servers, stage, number, loads, recorder, found, say))
    return found


async def _stage(
    servers: list[Up],
    stage: Stage,
    number: int,
    loads: Loads,
    recorder: Recorder,
    found: dict[str, float],
    say: Say,
) -> None:
    objective = loads.objective
    terms = Terms(limit_s=loads.limit_s)
    slo = Slo(objective.ttft_ms / 1000, objective.itl_ms / 1000)

    def done(measurement: Measurement) -> None:
        recorder.take(measurement.model_copy(update={"round": measurement.round + STAGE_ROUNDS * number}))
        say(line(measurement, slo))

    await warm_up(servers, dataclasses.replace(terms, limit_s=None), say)
    recorder.take_servers([up.server for up in servers])
    parts = [Part(ClosedLoop(count, max(4, 2 * count), loads.prompt, loads.output)) for count in stage.streams]
    await run_rounds(servers, parts, loads.rounds, terms, until=float("inf"), done=done, say=say)
    if stage.goodput:
        found |= await goodputs(servers, objective, say)


async def goodputs(servers: Sequence[Up], objective: Objective, say: Say) -> Mapping[str, float]:
    """One after the other; the second begins where the first ended."""
    found: dict[str, float] = {}
    rate = 1.0
    for up in servers:
        if up.target is not None:
            found[up.server.name] = await goodput(up.target, up.server.name, objective, rate, say)
            rate = found[up.server.name] or 1.0
            say(f"{up.server.name}: holds the SLO up to {found[up.server.name]:.2f} requests/s")
    return found


def stated(loads: Loads) -> dict[str, Any]:
    """The options as the run's file has them."""
    told = dataclasses.asdict(loads)
    told |= {"prompt": str(loads.prompt), "output": str(loads.output), "streams": list(loads.streams)}
    objective = told.pop("objective")
    return {**told, "ttft_ms": objective["ttft_ms"], "itl_ms": objective["itl_ms"], "seconds": objective["seconds"]}
