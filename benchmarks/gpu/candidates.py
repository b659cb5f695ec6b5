"""A few sets of options held against vLLM's defaults, all at once: what a quarter of an hour has room for of `tune`.

The sets are chosen by what limits the rate: ITL's p99 breaks where steps take too many prompt tokens beside the
replies' (Sarathi-Serve, Agrawal et al., OSDI 2024), and a step of 512 tokens is about where Synthia's weights stop
being what takes the time on Hopper chips. FP8 is another model, and so another profile, which is taken only by name.
"""

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.gpu.goodput import Objective, goodput
from benchmarks.gpu.search import Found, Options, Trial
from benchmarks.gpu.servers import DUMMY, FP8, Bench, Fleet, Variant
from benchmarks.gpu.tune import held_against_defaults, profile_of
from synthia_vllm.bench.clients import Clients, client_processes
from synthia_vllm.bench.interleaving import rotated, warm_up
from synthia_vllm.bench.measuring import Terms
from synthia_vllm.bench.peers import Say, Up
from synthia_vllm.engine.profiles import write_profile

CANDIDATES: Sequence[Options] = (
    {"max_num_batched_tokens": 512, "max_num_seqs": 256},
    {"max_num_batched_tokens": 768, "max_num_seqs": 512, "max_cudagraph_capture_size": 768},
    {**FP8, "max_num_batched_tokens": 1024, "max_num_seqs": 512},
)
# Where there is no GPU, for a look at the kit.
CPU_CANDIDATES: Sequence[Options] = ({"max_num_seqs": 64},)
DEFAULT = "vllm-default"
ROUND_S = 12.0  # of one trial, its last replies included: less left than one for each server, and no round is begun
KV_GIB = 13.2  # as in `measure`: more than the rates fill


@dataclasses.dataclass(frozen=True)
class Quick:
    """What is sent, and from which rate on."""

    objective: Objective = Objective(seconds=7.0, trials=1, precision=0.08, growth=1.25)  # noqa: RUF009
    start: float = 40.0
    rounds: int = 3


def tune_within(
    bench: Bench,
    candidates: Sequence[Options],
    quick: Quick,
    folder: Path,
    name: str,
    logs: Path,
    say: Say,
    until: float,
    *,
    dummy: bool,
) -> None:
    """Writes a profile for the best of each kind, with what was measured, after every round.

    Each round finds the goodput of every server, each first in turn; the gain is the median of the rounds' ratios.
    `<name>.yaml` has the model as it is, `<name>-fp8.yaml` FP8 weights.
    """
    extra = DUMMY if dummy else {}
    variants = [Variant(DEFAULT, "vLLM's server as started by default", "vllm-default", extra)]
    variants += [
        Variant(f"candidate-{number}", f"ours: {dict(options)}", "ours", {**extra, **options})
        for number, options in enumerate(candidates)
    ]
    found: dict[str, list[float]] = {}
    with Clients(client_processes()) as clients, Fleet(bench, logs, say) as fleet:
        servers = [up for up in fleet.start(variants, KV_GIB) if up.target is not None]
        if DEFAULT not in [up.server.name for up in servers]:
            say("vLLM's defaults did not start: nothing to hold candidates against")
            return
        asyncio.run(warm_up(servers, Terms(clients=clients), say))
        for number in range(quick.rounds):
            if number and time.monotonic() + ROUND_S * len(servers) * 2 > until:
                say(f"{number} of {quick.rounds} rounds: another would take longer than there is time")
                return
            values = asyncio.run(_round(servers, number, found, quick, clients, say))
            for server, value in values.items():
                found.setdefault(server, []).append(value)
            for suffix, options in _best(candidates, found).items():
                _write(bench, candidates, options, found, quick.objective, folder / f"{name}{suffix}.yaml", say)


async def _round(
    servers: Sequence[Up],
    number: int,
    found: Mapping[str, Sequence[float]],
    quick: Quick,
    clients: Clients,
    say: Say,
) -> dict[str, float]:
    values: dict[str, float] = {}
    rate = quick.start
    for up in rotated(servers, number):
        assert up.target is not None
        name = up.server.name
        start = found[name][-1] if found.get(name) else rate
        values[name] = await goodput(
            up.target, name, quick.objective, start or rate, say, seed=number + 1, clients=clients
        )
        rate = values[name] or rate
        say(f"round {number + 1}: {name}: holds the SLO up to {values[name]:.2f} requests/s")
    return values


def _best(candidates: Sequence[Options], found: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """The number of the best candidate of the model as it is, and of that in FP8, by the suffix of its profile."""
    best: dict[str, int] = {}
    for number, options in enumerate(candidates):
        suffix = "-fp8" if options.get("quantization") else ""
        rates = found.get(f"candidate-{number}")
        if rates and (suffix not in best or fmean(rates) > fmean(found[f"candidate-{best[suffix]}"])):
            best[suffix] = number
    return best


def _write(
    bench: Bench,
    candidates: Sequence[Options],
    number: int,
    found: Mapping[str, Sequence[float]],
    objective: Objective,
    file: Path,
    say: Say,
) -> None:
    defaults = found[DEFAULT]
    trials = []
    for other, options in enumerate(candidates):
        pairs = list(zip(defaults, found.get(f"candidate-{other}", ()), strict=False))
        ratios = [round(ours / theirs, 4) for theirs, ours in pairs if theirs]
        trials.append(Trial("options", dict(options), pairs, ratios, other == number))
    profile = profile_of(bench, objective, Found(dict(candidates[number]), trials), file.stem)
    write_profile(held_against_defaults(profile, trials[number].pairs), file)
    say(f"written: {file.name}: {trials[number]}")
