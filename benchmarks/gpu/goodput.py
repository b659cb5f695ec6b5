"""The highest rate of an open loop at which p99 TTFT and p99 ITL hold: what the tuner makes greater."""

from collections.abc import Callable
from dataclasses import dataclass

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.clients import Clients
from synthia_vllm.bench.measuring import Terms, measure
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.slo import Search, bisect
from synthia_vllm.bench.workloads import OpenLoop


@dataclass(frozen=True)
class Objective:
    """The SLO, and how long and how finely a rate is looked for; `growth` is that of `slo.bisect`."""

    ttft_ms: float = 450.0
    itl_ms: float = 40.0
    seconds: float = 20.0
    trials: int = 3
    precision: float = 0.05
    prompt: Span = Span(256, 256)  # noqa: RUF009
    output: Span = Span(128, 128)  # noqa: RUF009
    most: float = 1000.0
    growth: float = 2.0


async def goodput(
    target: Target,
    name: str,
    objective: Objective,
    start: float,
    say: Callable[[str], None],
    seed: int = 1,
    clients: Clients | None = None,
) -> float:
    """Requests a second; 0 where not even one request in `seconds` meets the SLO."""
    terms = Terms(seed, clients=clients)

    async def run(rate: float, number: int) -> Measurement:
        load = OpenLoop(rate, objective.seconds, objective.prompt, objective.output)
        return await measure(target, load, terms, server=name, number=number)

    search = Search(run, objective.ttft_ms, objective.itl_ms, objective.trials, lambda text: say(f"{name}: {text}"))
    least = 1 / objective.seconds
    low, _ = await bisect(search.holds, max(start, least), objective.precision, least, objective.most, objective.growth)
    return low or 0.0
