"""Several populations of users at once, each with a load, lengths, a weight and a key of its own."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from synthia_vllm.bench.client import Call
from synthia_vllm.bench.measuring import Kind, Load
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.workloads import arrivals, call_of

Tokens = Annotated[Any, BeforeValidator(Span.of)]


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("a name is wanted")
    return value


class Population(BaseModel):
    """One user, or users who count as one: an open loop (`rate`, requests a second) or a closed one (`streams`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_named)]
    rate: PositiveFloat | None = None
    streams: PositiveInt | None = None
    burstiness: PositiveFloat = 1.0
    prompt_tokens: Tokens = Span(32, 32)
    output_tokens: Tokens = Span(64, 64)
    weight: PositiveFloat = 1.0
    key: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_load(self) -> "Population":
        if (self.rate is None) == (self.streams is None):
            raise ValueError("either rate (requests a second) or streams (requests at once)")
        return self

    def call(self, load: Load, source: random.Random) -> Call:
        return call_of(load, self.prompt_tokens, self.output_tokens, self.name, self.key, source)


@dataclass(frozen=True)
class Users:
    """All populations send for so long; what is under way then is waited for."""

    populations: tuple[Population, ...]
    seconds: float
    label: str = ""
    kind: Kind = "users"
    streams: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return self.label or "users " + ", ".join(population.name for population in self.populations)

    @property
    def weights(self) -> Mapping[str, float]:
        return {population.name: population.weight for population in self.populations}

    async def drive(self, load: Load) -> None:
        async with asyncio.TaskGroup() as group:
            for population in self.populations:
                # Of its own: what one draws does not depend on how fast another's replies come.
                source = random.Random(load.random.random())
                if population.rate is not None:
                    for moment in arrivals(source, population.rate, self.seconds, population.burstiness):
                        group.create_task(load.send(population.call(load, source), moment))
                for _ in range(population.streams or 0):
                    group.create_task(self._stream(load, population, source))

    async def _stream(self, load: Load, population: Population, source: random.Random) -> None:
        due = 0.0
        while due < self.seconds:
            due = (await load.send(population.call(load, source), due)).done_s


def read_users(path: Path, seconds: float) -> Users:
    """From a YAML file: `users:` and a list of populations. Raises ClickException that names entry and field."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.ClickException(f"{path} can't be read: {error}") from error
    entries = found.get("users") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise click.ClickException(f"{path}: 'users:' and a list of populations are wanted")
    populations = []
    for number, entry in enumerate(entries, start=1):
        try:
            populations.append(Population.model_validate(entry))
        except ValidationError as error:
            wrong = error.errors()[0]
            what = ".".join(str(part) for part in wrong["loc"])
            raise click.ClickException(
                f"{path}, users, entry {number}: {what + ': ' * bool(what)}{wrong['msg']}"
            ) from error
    names = [population.name for population in populations]
    if len(set(names)) < len(names):
        raise click.ClickException(f"{path}: two populations have one name: {', '.join(names)}")
    return Users(tuple(populations), seconds, label=f"users of {path.stem}")
