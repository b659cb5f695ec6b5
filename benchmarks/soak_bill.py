"""The bill of a soak against what its engine counted, and where they differ, by kind of user."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.tables import Entry, Writer

_ID = 16  # characters of a request's own id, with which the names of what it asks an engine begin
_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One request of a ledger."""

    id: str
    request_id: str
    user: str
    prompt: int
    generated: int
    outcome: str


@dataclass(frozen=True)
class Tokens:
    """Of prompts, and generated."""

    prompt: int = 0
    generated: int = 0


@dataclass
class Bill:
    """What came of a comparison; differences are what the engine counted less what is accounted for."""

    counted: Tokens
    billed: Tokens = Tokens()
    prompts_again: int = 0  # tokens: an engine computes a prompt for each of `n` replies, which is billed once
    prompts_left: int = 0  # tokens: billed to who left before the first token; the engine counts with that
    canaries: Counter[str] = field(default_factory=Counter)
    unbilled: list[Row] = field(default_factory=list)  # the engine's own ledger has them, the bill has not
    engines_own: Tokens = Tokens()  # what the engine's own ledger says
    billed_by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)  # differences
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def generated_difference(self) -> int:
        return self.counted.generated - self.billed.generated - self.canaries["generated"]

    @property
    def prompt_difference(self) -> int:
        accounted = self.billed.prompt - self.prompts_left + self.prompts_again + self.canaries["prompt"]
        return self.counted.prompt - accounted

    def figures(self) -> dict[str, Any]:
        return {
            "engine's counters": vars(self.counted),
            "ledger": vars(self.billed),
            "engine's own ledger": vars(self.engines_own),
            "prompts computed again for n > 1": self.prompts_again,
            "prompts of those who left before the first token": self.prompts_left,
            "canaries": dict(self.canaries),
            "generated: counted, not accounted for": self.generated_difference,
            "prompt: counted, not accounted for": self.prompt_difference,
            "requests that only the engine's ledger has": len(self.unbilled),
            "billed by kind": {kind: dict(one) for kind, one in self.billed_by_kind.items()},
            "differences by kind": {kind: dict(found) for kind, found in self.by_kind.items()},
            "examples": self.examples,
        }


def rows(url: str) -> list[Row]:
    """A whole ledger."""
    database = open_database(url)
    columns = Entry.id, Entry.request_id, Entry.user, Entry.prompt_tokens, Entry.generated_tokens, Entry.outcome
    with Session(database) as session:
        found = [Row(*row) for row in session.execute(select(*columns))]
    database.dispose()
    return found


def gaps(url: str) -> int:
    """Writers that ended without a word."""
    database = open_database(url)
    with Session(database) as session:
        found = len(session.scalars(select(Writer).where(Writer.gap | Writer.ended.is_(None))).all())
    database.dispose()
    return found


def compare(bill: Sequence[Row], engines: Sequence[Row], counted: Tokens, kind: Callable[[str], str]) -> Bill:
    """`bill` is the gateway's ledger, `engines` that of the engine's own server, which has a row for each sequence."""
    found = Bill(counted, _sum(bill), engines_own=_sum(engines))
    ids = {row.id for row in bill}
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in engines:
        whose = row.request_id[:_ID]
        if whose in ids:
            parts[whose].append(row)
        elif row.prompt <= 1 and row.generated <= 1:
            found.canaries.update(requests=1, prompt=row.prompt if row.generated else 0, generated=row.generated)
        else:
            found.unbilled.append(row)
    for row in bill:
        _compare(found, row, parts[row.id], kind(row.user))
    return found


def _compare(found: Bill, row: Row, parts: Sequence[Row], kind: str) -> None:
    """One request, and what its sequences were to the engine."""
    sums = found.billed_by_kind.setdefault(kind, Counter())
    sums.update(requests=1, prompt=row.prompt, generated=row.generated)
    begun = [part for part in parts if part.generated]  # the engine counts a prompt with its first token
    if begun:
        found.prompts_again += row.prompt * (len(begun) - 1)
    else:
        found.prompts_left += row.prompt
    generated = sum(part.generated for part in parts) - row.generated
    prompt = sum(part.prompt for part in begun) - row.prompt * len(begun)
    if not generated and not prompt:
        return
    found.by_kind.setdefault(kind, Counter()).update(requests=1, generated=generated, prompt=prompt)
    if sum(one["kind"] == kind for one in found.examples) < _SHOWN:
        told = [[part.prompt, part.generated, part.outcome] for part in parts]
        found.examples.append({"kind": kind, "billed": [row.prompt, row.generated, row.outcome], "engine": told})


def _sum(found: Sequence[Row]) -> Tokens:
    return Tokens(sum(row.prompt for row in found), sum(row.generated for row in found))
