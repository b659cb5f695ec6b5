"""A trace file: when each request came, how long it was, and whose."""

import asyncio
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from synthia_vllm.bench.measuring import Kind, Load
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.workloads import call_of


class Row(BaseModel):
    """One request. `arrival` is in seconds from any zero; the first row's is taken for the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrival: NonNegativeFloat
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
    user: str = Field(default="", max_length=64)


@dataclass(frozen=True)
class Trace:
    """Sends a trace's requests at its moments, `speed` times as fast."""

    label: str
    rows: tuple[Row, ...]
    speed: float = 1.0
    kind: Kind = "trace"
    streams: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"trace {self.label}" + (f", {self.speed:g} times as fast" if self.speed != 1 else "")

    @property
    def rate(self) -> float | None:
        lasts = (self.rows[-1].arrival - self.rows[0].arrival) / self.speed
        return round(len(self.rows) / lasts, 6) if lasts else None

    async def drive(self, load: Load) -> None:
        first = self.rows[0].arrival
        calls = [call_of(load, Span.of(row.prompt_tokens), Span.of(row.output_tokens), row.user) for row in self.rows]
        async with asyncio.TaskGroup() as group:
            for row, call in zip(self.rows, calls, strict=True):
                group.create_task(load.send(call, (row.arrival - first) / self.speed))


def read_trace(path: Path, *, speed: float = 1.0) -> Trace:
    """From `.csv` (with a head line) or `.jsonl`, ordered by arrival. Raises ClickException that names the line."""
    if path.suffix not in (".csv", ".jsonl"):
        raise click.ClickException(f"{path}: a trace is a .csv or a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} can't be read: {error}") from error
    rows = []
    for number, fields in _csv(path, text) if path.suffix == ".csv" else _json_lines(path, text):
        try:
            rows.append(Row.model_validate(fields))
        except ValidationError as error:
            wrong = error.errors()[0]
            what = ".".join(str(part) for part in wrong["loc"]) or "row"
            raise click.ClickException(
                f"{path}, line {number}: {what}: {wrong['msg']} (got {wrong['input']!r})"
            ) from error
        if len(rows) > 1 and rows[-1].arrival < rows[-2].arrival:
            raise click.ClickException(
                f"{path}, line {number}: arrival {rows[-1].arrival:g} is before the line above, {rows[-2].arrival:g}"
            )
    if not rows:
        raise click.ClickException(f"{path}: no requests in it")
    return Trace(path.stem, tuple(rows), speed)


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = {"arrival", "prompt_tokens", "output_tokens"} - set(reader.fieldnames or ())
    if missing:
        raise click.ClickException(f"{path}, line 1: no column {', '.join(sorted(missing))}")
    for row in reader:
        if None in row or None in row.values():
            raise click.ClickException(
                f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} columns are wanted, as in line 1"
            )
        yield reader.line_num, row


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise click.ClickException(f"{path}, line {number}: not JSON: {error}") from error
