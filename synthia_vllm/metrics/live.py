"""The live view, as JSON, for the status page and `synthia-vllm top`. Times in seconds, rates in tokens a second."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.history import History
from synthia_vllm.metrics.local import KV_USE, RUNNING, WAITING, LocalEngine
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.series import LOCAL


def live_view(
    recorder: Recorder, waiting: Waiting, history: History, fleet: Fleet | None, local: LocalEngine
) -> dict[str, Any]:
    """See the keys below; what nobody tells is null."""
    rates: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (_, replica), prompt, generation in recorder.rates.rates():
        rates[replica][0] += prompt
        rates[replica][1] += generation
    budget = recorder.budget
    return {
        "at": time.time(),
        "slo": {
            "objective": budget.objective,
            "met": budget.met,
            "missed": budget.missed,
            "burn_rate": budget.burn_rates(),
            "targets": {
                "interactive": recorder.slo.interactive.model_dump(),
                "batch": recorder.slo.batch.model_dump(),
            },
        },
        "now": {
            "prompt_per_s": sum(prompt for prompt, _ in rates.values()),
            "generation_per_s": sum(generation for _, generation in rates.values()),
            "running": sum(waiting.in_flight.values()),
            "queued": sum(waiting.queued.values()),
            # Replicas that can generate: with none, the rest tells of nobody.
            "serving": 1 if fleet is None else fleet.serving,
        },
        "recent": history.recent(),
        "replicas": _local(local, waiting, rates) if fleet is None else _replicas(fleet, rates),
        "users": _users(recorder, waiting),
        "history": history.as_dict(),
    }


def _local(local: LocalEngine, waiting: Waiting, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [_replica(LOCAL, "up", True, sum(waiting.in_flight.values()), local.values().get, rates)]


def _replicas(fleet: Fleet, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = [
        _replica(name, engine.view.state, engine.fresh, engine.view.in_flight, engine.page.value, rates)
        for name, engine in fleet.engines.items()
    ]
    return found + [_replica(name, "out", False, 0, lambda _: None, rates) for name in fleet.gone_since]


def _replica(
    name: str,
    state: str,
    fresh: bool,
    in_flight: int,
    told: Callable[[str], float | None],
    rates: dict[str, list[float]],
) -> dict[str, Any]:
    prompt, generation = rates.get(name, (0.0, 0.0))
    return {
        "name": name,
        "state": state,
        "fresh": fresh,
        "in_flight": in_flight,
        "running": told(RUNNING),
        "waiting": told(WAITING),
        "kv_use": told(KV_USE),
        "prompt_per_s": prompt,
        "generation_per_s": generation,
    }


def _users(recorder: Recorder, waiting: Waiting) -> list[dict[str, Any]]:
    """Most tokens first. `share` is of all service since the start."""
    users: dict[str, dict[str, Any]] = {}

    def row(user: str) -> dict[str, Any]:
        return users.setdefault(
            user,
            {
                "user": user,
                "prompt_tokens": 0,
                "generation_tokens": 0,
                "share": 0.0,
                "in_flight": 0,
                "queued": 0,
                "refused": 0,
                "slo_met": 0,
                "slo_missed": 0,
            },
        )

    for (user, _), cell in recorder.prompt_tokens.cells.items():
        row(user)["prompt_tokens"] += cell.value
    for (user, _), cell in recorder.generation_tokens.cells.items():
        row(user)["generation_tokens"] += cell.value
    for (user, _), cell in recorder.rejections.cells.items():
        row(user)["refused"] += cell.value
    for (user, result), cell in recorder.slo_requests.cells.items():
        row(user)[f"slo_{result}"] += cell.value
    for name, numbers in (("in_flight", waiting.in_flight), ("queued", waiting.queued)):
        for user, number in numbers.items():
            row(recorder.user(user))[name] += number
    service = sum(cell.value for cell in recorder.service.cells.values())
    for (user,), cell in recorder.service.cells.items():
        row(user)["share"] = cell.value / service if service else 0.0
    return sorted(users.values(), key=lambda found: -found["prompt_tokens"] - found["generation_tokens"])
