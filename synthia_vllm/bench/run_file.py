"""What a benchmark run leaves behind: one JSON file that holds every request, and the machine it ran on.

The runner writes it; the report, `compare` and the sizing read nothing else. Times are seconds; a request's times count
from the start of its measurement. A figure that follows from the requests is computed, not stored (see `summary`).
"""

import gzip
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(_Part):
    """One request as its client saw it."""

    user: str = ""
    # When the workload wanted it sent, and when it was; the difference is the client's own lateness.
    due_s: float
    sent_s: float
    # When each chunk with a token came, in seconds from the start of the measurement; the first is TTFT's end.
    chunk_s: list[float] = Field(default_factory=list)
    done_s: float
    # Asked for, by the server's `usage`, and seen by the client (None: the server sent no token ids).
    prompt_tokens: int = 0
    wanted_tokens: int = 0
    output_tokens: int = 0
    seen_tokens: int | None = None
    finish_reason: str | None = None
    status: int | None = None
    # What was wrong: "http 500", "cut", "stalled", "usage", "short", …; None: a whole reply.
    error: str | None = None
    detail: str = ""


class Measurement(_Part):
    """One server under one load, once."""

    server: str
    workload: str
    round: int
    # What the load was: `streams` for a closed loop, `rate` in requests a second for an open one.
    kind: Literal["closed", "open", "conversations", "trace", "users"]
    streams: int | None = None
    rate: float | None = None
    started_at: float  # Unix time
    duration_s: float
    requests: list[Request]
    # Why this measurement tells nothing about the server: the client was late, for instance. Empty: valid.
    invalid: list[str] = Field(default_factory=list)
    # Of processors that the server's API process used meanwhile, its threads included, without the engine's processes.
    processor_s: float | None = None
    # And of the API process behind it, where the server is a gateway.
    upstream_processor_s: float | None = None
    # Weight of each user, for the service gap.
    weights: dict[str, float] = Field(default_factory=dict)


class Server(_Part):
    """A peer, or one of ours. `missing` says why it was left out."""

    name: str
    title: str
    command: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    version: str = ""
    startup_s: float | None = None
    memory_bytes: int | None = None
    missing: str | None = None


class Roofline(_Part):
    """What the machine can do and what a token needs (Williams et al., 2009)."""

    bandwidth_bytes_s: float
    matrix_flops_s: float
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: float
    notes: list[str] = Field(default_factory=list)


class Run(_Part):
    """A whole run."""

    schema_version: int = SCHEMA
    command: list[str]
    profile: str
    started_at: float
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    model: dict[str, Any]
    servers: list[Server]
    measurements: list[Measurement]
    roofline: Roofline | None = None
    # Results of `bench slo`, `ceiling`, `chaos` and of the sizing, each as its own module writes it.
    slo: dict[str, Any] | None = None
    ceiling: dict[str, Any] | None = None
    chaos: dict[str, Any] | None = None
    sizing: dict[str, Any] | None = None


def read(path: Path) -> Run:
    """Raises ValueError that names the file and the field. A name that ends in .gz is of a compressed file."""
    try:
        raw = path.read_bytes()
        return Run.model_validate_json(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (ValueError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a result of `synthia-vllm bench` of this version: {error}") from error


def report_beside(path: Path) -> Path:
    """Where a run's report goes: `run.html` for `run.json` and for `run.json.gz`."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".json") + ".html")


def write(run: Run, path: Path) -> None:
    """Replaces the file in one step, so that an interrupted run leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    text = run.model_dump_json(exclude_defaults=True) + "\n"
    beside.write_bytes(gzip.compress(text.encode(), 6, mtime=0) if path.suffix == ".gz" else text.encode())
    beside.replace(path)
