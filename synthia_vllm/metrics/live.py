"""The live view, as JSON, for the status page and `synthia-vllm top`. Times in seconds, rates in tokens a second."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from synthia_vllm.metrics import series
from synthia_vllm.metrics.fleet import LIVE_IN_FLIGHT, Fleet
from synthia_vllm.metrics.history import History
from synthia_vllm.metrics.local import KV_USE, RUNNING, WAITING, LocalEngine
from synthia_vllm.metrics.recorder import LIVE_SLO, Tables
from synthia_vllm.metrics.series import LOCAL
from synthia_vllm.metrics.slo import WINDOWS_S, burn_rate
from synthia_vllm.settings import SloSettings


def live_view(
    tables: Tables, slo: SloSettings, history: History, fleet: Fleet | None, local: LocalEngine
) -> dict[str, Any]:
    """See the keys below; what nobody tells is null."""
    rates: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (_, replica, kind), cell in tables[series.TOKENS_PER_SECOND.name].cells.items():
        rates[replica][kind == "generation"] += cell.value
    judged: Counter[str] = Counter()
    for (_, result), cell in tables[series.SLO_REQUESTS.name].cells.items():
        judged[result] += cell.value
    running = _sum(tables, series.REQUESTS_IN_FLIGHT)
    return {
        "at": time.time(),
        "slo": {
            "objective": slo.objective,
            "met": judged["met"],
            "missed": judged["missed"],
            "burn_rate": _burn_rates(tables, slo.objective),
            "targets": {"interactive": slo.interactive.model_dump(), "batch": slo.batch.model_dump()},
        },
        "now": {
            "prompt_per_s": sum(prompt for prompt, _ in rates.values()),
            "generation_per_s": sum(generation for _, generation in rates.values()),
            "running": running,
            "queued": _sum(tables, series.REQUESTS_QUEUED),
            # Replicas that can generate: with none, the rest tells of nobody.
            "serving": 1 if fleet is None else fleet.serving,
        },
        "recent": history.recent(),
        "replicas": _local(local, running, rates) if fleet is None else _replicas(fleet, tables, rates),
        "users": _users(tables),
        "history": history.as_dict(),
    }


def _sum(tables: Tables, family: series.Family) -> int:
    return int(sum(cell.value for cell in tables[family.name].cells.values()))


def _burn_rates(tables: Tables, objective: float) -> dict[str, float | None]:
    cells = tables[LIVE_SLO.name].cells
    told = {window: [cells[window, result].value for result in ("met", "missed")] for window in WINDOWS_S}
    return {window: burn_rate(met, missed, objective) for window, (met, missed) in told.items()}


def _local(local: LocalEngine, running: int, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [_replica(LOCAL, "up", True, running, local.values().get, rates)]


def _replicas(fleet: Fleet, tables: Tables, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    in_flight = {name: int(cell.value) for (name,), cell in tables[LIVE_IN_FLIGHT.name].cells.items()}
    found = [
        _replica(name, engine.view.state, engine.fresh, in_flight.get(name, 0), engine.page.value, rates)
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


def _users(tables: Tables) -> list[dict[str, Any]]:
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

    for (user, _), cell in tables[series.PROMPT_TOKENS.name].cells.items():
        row(user)["prompt_tokens"] += cell.value
    for (user, _), cell in tables[series.GENERATION_TOKENS.name].cells.items():
        row(user)["generation_tokens"] += cell.value
    for (user, _), cell in tables[series.REJECTIONS.name].cells.items():
        row(user)["refused"] += cell.value
    for (user, result), cell in tables[series.SLO_REQUESTS.name].cells.items():
        row(user)[f"slo_{result}"] += cell.value
    for name, family in (("in_flight", series.REQUESTS_IN_FLIGHT), ("queued", series.REQUESTS_QUEUED)):
        for (user,), cell in tables[family.name].cells.items():
            if cell.value or user in users:
                row(user)[name] += int(cell.value)
    served = tables[series.FAIR_SERVICE.name].cells
    service = sum(cell.value for cell in served.values())
    for (user,), cell in served.items():
        row(user)["share"] = cell.value / service if service else 0.0
    return sorted(users.values(), key=lambda found: -found["prompt_tokens"] - found["generation_tokens"])
