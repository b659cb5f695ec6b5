"""Does the simulator tell what was measured? Calibrates on some loads of a run and predicts three others."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from synthia_vllm.bench.run_file import Measurement, Run
from synthia_vllm.bench.sizing.answer import Answer, Wanted
from synthia_vllm.bench.sizing.calibration import calibrate
from synthia_vllm.bench.sizing.engine_model import (
    DEFAULT_KV_TOKENS,
    DEFAULT_MAX_BATCHED_TOKENS,
    DEFAULT_MAX_SEQS,
    EngineModel,
)
from synthia_vllm.bench.sizing.simulator import Cluster, Outcome, run
from synthia_vllm.bench.sizing.traffic import of_measurement
from synthia_vllm.bench.summary import Load, Summary, tokens_of, ttft
from synthia_vllm.engine.arguments import CPU_BATCHED_TOKENS

HELD_OUT = 3
TOLERANCE = 0.15
_SEEDS = 20
_FEWEST_REQUESTS = 8


@dataclass(frozen=True)
class Row:
    """Seconds and tokens a second. An error is simulated / measured - 1."""

    load: str
    requests: int
    calibrated: bool
    measured_ttft_p50: float
    simulated_ttft_p50: float
    measured_ttft_p99: float
    simulated_ttft_p99: float
    # What the measured p99 itself is good for: its 95 % bootstrap interval.
    measured_ttft_p99_low: float
    measured_ttft_p99_high: float
    measured_throughput: float
    simulated_throughput: float

    @property
    def errors(self) -> tuple[float, float, float]:
        """Of p50 TTFT, p99 TTFT and throughput."""
        return (
            self.simulated_ttft_p50 / self.measured_ttft_p50 - 1,
            self.simulated_ttft_p99 / self.measured_ttft_p99 - 1,
            self.simulated_throughput / self.measured_throughput - 1,
        )


def check(run_: Run, server: str | None = None) -> Run:
    """The run with the table in `sizing`. Raises ValueError where too little was measured."""
    name, loads = usable(run_, server)
    held = hold_out(list(loads))
    if len(held) < HELD_OUT:
        raise ValueError(
            f"{HELD_OUT} loads to predict are needed, each between two others of its kind; {name} has {len(held)} "
            f"(of {len(loads)} loads): run more with `synthia-vllm bench run`, as with --rates 1,2,4,6,8"
        )
    cluster = Cluster(fair_queue=_is_ours(name))
    training = [m for load, measurements in loads.items() if load not in held for m in measurements]
    model = calibrate(training, **engine_limits(run_, name), cluster=cluster)
    rows = [row(load, measurements, model, cluster, load not in held) for load, measurements in loads.items()]
    return run_.model_copy(update={"sizing": table(name, model, rows)})


def calibrated(run_: Run, server: str | None = None) -> tuple[str, EngineModel]:
    """On all that was measured, for a sizing. Raises ValueError as `check`."""
    name, loads = usable(run_, server)
    everything = [m for measurements in loads.values() for m in measurements]
    return name, calibrate(everything, **engine_limits(run_, name), cluster=Cluster(fair_queue=_is_ours(name)))


def usable(run_: Run, server: str | None) -> tuple[str, dict[Load, list[Measurement]]]:
    """The server and its valid measurements in open and closed loops that say enough."""
    summary = Summary(run_)
    names = summary.servers()
    name = server or next((known for known in names if known == "ours"), names[0] if names else "")
    if name not in names:
        raise ValueError(f"no valid measurement of server {name!r}; there are: {', '.join(names) or 'none'}")
    loads = {
        load: kept
        for load in summary.loads("closed", "open")
        if (kept := [m for m in summary.measurements(name, load) if _whole(m) >= _FEWEST_REQUESTS])
    }
    if not loads:
        raise ValueError(f"server {name!r} has no open or closed loop with {_FEWEST_REQUESTS} whole replies")
    return name, loads


def hold_out(loads: Sequence[Load]) -> list[Load]:
    """Three loads between others of their family, open loops first: the ends are needed to calibrate on."""
    families: dict[tuple[str, str], list[Load]] = {}
    for load in loads:
        families.setdefault((load.kind, load.family), []).append(load)
    inner = {key: own[1:-1] for key, own in families.items() if len(own) > 2}
    found: list[Load] = []
    # Every second one, so that what is held out lies between loads that are known; then the rest.
    for own in sorted(inner.values(), key=lambda own: (own[0].kind != "open", -len(own))):
        found += own[::2]
    for own in inner.values():
        found += [load for load in own if load not in found]
    return found[: min(HELD_OUT, len(loads) - 2)]


def row(
    load: Load, measurements: Sequence[Measurement], model: EngineModel, cluster: Cluster, is_calibrated: bool
) -> Row:
    """Rounds pooled; each is simulated several times, with its own requests."""
    outcomes = [
        run(of_measurement(measurement), model, cluster, seed=seed)
        for measurement in measurements
        for seed in range(_SEEDS)
    ]
    simulated = np.concatenate([outcome.ttft_s for outcome in outcomes])
    measured = np.asarray(
        [ttft(request) for m in measurements for request in m.requests if request.error is None and request.chunk_s]
    )
    picks = np.random.default_rng(1).integers(0, len(measured), (1000, len(measured)))
    low, high = np.percentile(np.percentile(measured[picks], 99, axis=1), [2.5, 97.5])
    return Row(
        load=str(load),
        requests=len(measured),
        calibrated=is_calibrated,
        measured_ttft_p50=float(np.median(measured)),
        simulated_ttft_p50=float(np.median(simulated)),
        measured_ttft_p99=float(np.percentile(measured, 99)),
        simulated_ttft_p99=float(np.median([_p99(outcome) for outcome in outcomes]))
        if len(measurements) == 1
        else float(np.percentile(simulated, 99)),
        measured_ttft_p99_low=float(low),
        measured_ttft_p99_high=float(high),
        measured_throughput=float(np.mean([_throughput(measurement) for measurement in measurements])),
        simulated_throughput=float(np.mean([outcome.output_throughput for outcome in outcomes])),
    )


def table(server: str, model: EngineModel, rows: Sequence[Row]) -> dict[str, Any]:
    """As it goes into the run's file."""
    return {
        "server": server,
        "model": {
            "sequences": list(model.knots),
            "step_s": list(model.decode_s),
            "prompt_step_s": model.prompt_step_s,
            "prefill_s_per_token": model.prefill_s,
            "overhead_s": model.overhead_s,
            "noise_sd": float(np.std(model.noise)),
            "max_seqs": model.max_seqs,
            "max_batched_tokens": model.max_batched_tokens,
            "kv_tokens": model.kv_tokens,
        },
        "tolerance": TOLERANCE,
        "rows": [asdict(one) | {"errors": list(one.errors)} for one in rows],
    }


def answered(run_: Run, wanted: Wanted, answer: Answer) -> Run:
    """With what was asked and found beside the check. JSON has no infinity: what was given up as hopeless is None."""
    trials = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in found.items()
        }
        for found in (asdict(trial) for trial in answer.trials)
    ]
    found = {"wanted": asdict(wanted), "replicas": answer.replicas, "trials": trials}
    return run_.model_copy(update={"sizing": {**(run_.sizing or {}), "answer": found}})


def engine_limits(run_: Run, server: str) -> dict[str, int]:
    """From the server's command and the run's options, where they name them; else the defaults on a CPU."""
    command = next((s.command for s in run_.servers if s.name == server), [])
    batched = CPU_BATCHED_TOKENS if _is_ours(server) else DEFAULT_MAX_BATCHED_TOKENS
    found = {
        "max_seqs": _option(command, "max[-_]num[-_]seqs") or DEFAULT_MAX_SEQS,
        "max_batched_tokens": _option(command, "max[-_]num[-_]batched[-_]tokens") or batched,
        "kv_tokens": DEFAULT_KV_TOKENS,
    }
    kv_bytes = _option(command, "kv[-_]cache[-_]memory[-_]bytes")
    if kv_bytes is None and (gib := run_.options.get("kv_cache_gib")):
        kv_bytes = int(float(gib) * 2**30)
    a_token = run_.model.get("kv_bytes_per_token") or (run_.roofline.kv_bytes_per_token if run_.roofline else None)
    if kv_bytes and a_token:
        found["kv_tokens"] = kv_bytes // int(a_token)
    return found


def _option(command: Sequence[str], name: str) -> int | None:
    found = re.search(rf"--{name}[= ]([\d.]+)", " ".join(command))
    return round(float(found.group(1))) if found else None


def _is_ours(server: str) -> bool:
    """Only our gateway has the fair queue; the others' requests wait in the engine."""
    return server.startswith("ours")


def _whole(measurement: Measurement) -> int:
    return sum(request.error is None and bool(request.chunk_s) for request in measurement.requests)


def _throughput(measurement: Measurement) -> float:
    """From the first request sent to the last chunk, as the simulator counts."""
    whole = [request for request in measurement.requests if request.error is None and request.chunk_s]
    lasts = max(r.chunk_s[-1] for r in whole) - min(r.sent_s for r in whole)
    return sum(map(tokens_of, whole)) / lasts


def _p99(outcome: Outcome) -> float:
    return float(np.percentile(outcome.ttft_s[np.isfinite(outcome.ttft_s)], 99))
