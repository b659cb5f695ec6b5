"""Searches for the vLLM options with the greatest goodput on this machine and writes the profile that `serve` takes."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.goodput import Objective, goodput
from benchmarks.gpu.search import Found, Options, Trial, search
from benchmarks.gpu.servers import DUMMY, Bench, Variant, serving
from benchmarks.gpu.table import GAIN
from synthia_vllm.bench.interleaving import warm_up
from synthia_vllm.bench.measuring import Terms
from synthia_vllm.bench.peers import Say, Up
from synthia_vllm.engine.memory import read_config
from synthia_vllm.engine.private_vllm import installed_vllm
from synthia_vllm.engine.profiles import Profile, geometry_of, hardware_of, write_profile


class Tuner:
    """Compares sets of options by the goodput of two servers that run side by side."""

    def __init__(self, bench: Bench, objective: Objective, pairs: int, logs: Path, say: Say, *, dummy: bool) -> None:
        self.bench, self.objective, self.pairs, self.logs, self.say = bench, objective, pairs, logs, say
        self._extra = DUMMY if dummy else {}
        self._rate = 1.0

    def compare(self, best: Options, candidate: Options) -> list[tuple[float, float]]:
        """Goodput of both, pair by pair, each first in turn. Empty where one of them does not start."""
        return self._pairs(
            Variant("best", f"the best so far: {dict(best)}", "ours", {**self._extra, **best}),
            Variant("candidate", f"{dict(candidate)}", "ours", {**self._extra, **candidate}),
        )

    def against_defaults(self, best: Options) -> list[tuple[float, float]]:
        """vLLM's server as started by default, and ours with these options."""
        return self._pairs(
            Variant("vllm-default", "vLLM's server as started by default", "vllm-default", self._extra),
            Variant("profile", f"ours: {dict(best)}", "ours", {**self._extra, **best}),
        )

    def _pairs(self, one: Variant, other: Variant) -> list[tuple[float, float]]:
        with serving(self.bench, [one, other], self.logs, self.say) as servers:
            if any(up.target is None for up in servers):
                return []
            return asyncio.run(self._goodputs(servers))

    async def _goodputs(self, servers: list[Up]) -> list[tuple[float, float]]:
        await warm_up(servers, Terms(), self.say)
        found = []
        for number in range(self.pairs):
            values: dict[str, float] = {}
            for up in servers[:: 1 if number % 2 == 0 else -1]:
                assert up.target is not None
                name = up.server.name
                values[name] = await goodput(up.target, name, self.objective, self._rate, self.say, seed=number + 1)
                self._rate = values[name] or self._rate
            found.append((values[servers[0].server.name], values[servers[1].server.name]))
            self.say(f"pair {number + 1} of {self.pairs}: {found[-1][0]:.2f} and {found[-1][1]:.2f} requests/s")
        return found


def tune(tuner: Tuner, knobs: Mapping[str, Sequence[Any]], file: Path) -> Profile:
    """The search; the profile's file is written after every trial, so that an interruption leaves the best so far."""
    trials: list[Trial] = []

    def done(trial: Trial, best: dict[str, Any]) -> None:
        trials.append(trial)
        tuner.say(str(trial))
        write_profile(profile_of(tuner.bench, tuner.objective, Found(best, trials), file.stem), file)

    found = search(knobs, tuner.compare, done=done)
    profile = profile_of(tuner.bench, tuner.objective, found, file.stem)
    pairs = tuner.against_defaults(found.options)
    if pairs:
        profile = held_against_defaults(profile, pairs)
    write_profile(profile, file)
    return profile


def profile_of(bench: Bench, objective: Objective, found: Found, name: str) -> Profile:
    config = read_config(str(bench.model))
    assert config is not None
    return Profile(
        name=name,
        hardware=hardware_of(bench.machine),
        geometry=geometry_of(config),
        options=found.options,
        measured={
            "vllm": installed_vllm(),
            "slo": {"ttft_ms": objective.ttft_ms, "itl_ms": objective.itl_ms},
            "load": {"prompt_tokens": str(objective.prompt), "output_tokens": str(objective.output)},
            "trials": [str(trial) for trial in found.trials],
        },
    )


def held_against_defaults(profile: Profile, pairs: Sequence[tuple[float, float]]) -> Profile:
    """The profile with what was measured: the goodput of vLLM's defaults and its own, pair by pair, and the gain."""
    gains = sorted(ours / theirs for theirs, ours in pairs if theirs)
    told = {GAIN: round(gains[len(gains) // 2], 3)} if gains else {}
    measured = {**profile.measured, **told, "defaults, profile": [list(pair) for pair in pairs]}
    return profile.model_copy(update={"measured": measured})


def profile_name(bench: Bench, geometry: str) -> str:
    """`h200-11b` for Synthia on an `NVIDIA H200`."""
    words = re.sub(r"[^a-z0-9]+", " ", hardware_of(bench.machine).lower()).split()
    chip = next((word for word in words if word != "nvidia"), "gpu")
    return f"{chip}-{'11b' if geometry == 'synthia' else geometry}"
