"""What one gateway has counted at one moment, as other gateways read it, and the sum over several of them.

Counts are integers, in parts of 2^-20: floats that are added up in another order differ in their last digit, and a sum
that falls by its last digit has begun anew to Prometheus, which then adds the whole of it to a rate.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Counts, Histogram, Histograms, Table
from synthia_vllm.metrics.series import Family

_PARTS = 1 << 20
_CAPPED = ("user", "model")  # labels whose values are bounded
_CELLS_A_TURN = 200

Labels = tuple[str, ...]
Shown = Callable[[str, str], str | None]  # of a label and its value: as which it is told; None: not yet
Merge = Callable[[float, float], float]
_OVER_GATEWAYS: Mapping[str, Merge] = {  # gauges that are no sum
    series.SLO_OBJECTIVE.name: max,
    series.LEDGER_UP.name: min,
    series.EVENT_LOOP_BUSY.name: max,
    "synthia_limits_shared_up": min,
}


class Snapshot:
    """Counters and histograms by family and labels, which only grow, and gauges.

    A counter is a list of one number; a histogram one of its counts by bucket, and its sum. Lists are never changed, so
    that snapshots may share them. What takes long gives way to others in between.
    """

    __slots__ = ("counted", "gauges", "texts")

    def __init__(self) -> None:
        self.counted: dict[str, dict[Labels, list[int]]] = {}
        self.gauges: dict[str, dict[Labels, float]] = {}
        self.texts: dict[str, bytes] = {}  # of `counted`, where it was decoded

    @classmethod
    async def of(cls, tables: Iterable[Table], told: "ToldLabels") -> "Snapshot":
        """Cells that come to be told under one name are added up; those that are not told yet are left out."""
        found = cls()
        for table in tables:
            await found._take(table, told)
        return found

    @classmethod
    async def decode(cls, text: bytes, before: "Snapshot | None" = None) -> "Snapshot":
        """`before`: an earlier one, much of which may be the same."""
        found = cls()
        counted, gauges = _DECODER.decode(text)
        for name, raw in counted.items():
            cells = found.texts[name] = bytes(raw)
            if before is not None and before.texts.get(name) == cells:
                found.counted[name] = before.counted[name]
            else:
                found.counted[name] = dict(_CELLS.decode(cells))
                await asyncio.sleep(0)
        found.gauges = {name: dict(values) for name, values in gauges.items()}
        return found

    async def encode(self) -> bytes:
        """As JSON, whose integers have no end."""
        parts: list[bytes] = []
        for name, cells in self.counted.items():
            parts.append(b"%b:%b" % (msgspec.json.encode(name), msgspec.json.encode(list(cells.items()))))
            await asyncio.sleep(0)
        gauges = {name: list(cells.items()) for name, cells in self.gauges.items()}
        return b"[{%b},%b]" % (b",".join(parts), msgspec.json.encode(gauges))

    async def add(self, other: "Snapshot", *, gauges: bool = True) -> None:
        for key, cells in other.counted.items():
            own = self.counted.get(key)
            if own is None:
                self.counted[key] = dict(cells)
            else:
                async for labels, numbers in _in_turns(cells):
                    had = own.get(labels)
                    own[labels] = numbers if had is None else list(map(int.__add__, had, numbers))
        for key, values in other.gauges.items() if gauges else ():
            merge = _OVER_GATEWAYS.get(key.partition(" ")[0], float.__add__)
            mine = self.gauges.setdefault(key, {})
            for labels, value in values.items():
                mine[labels] = merge(mine[labels], value) if labels in mine else value

    async def subtract(self, other: "Snapshot") -> None:
        """Takes what was counted before from what is counted now."""
        for key, cells in other.counted.items():
            async for labels, numbers in _in_turns(cells):
                self.counted[key][labels] = list(map(int.__sub__, self.counted[key][labels], numbers))

    async def _take(self, table: Table, told: "ToldLabels") -> None:
        family = table.family
        cells: dict[Labels, Any] = {}
        assert isinstance(table, Counts | Histograms)
        async for labels, cell in _in_turns(table.cells):
            key = told.of(family, labels)
            if key is None:
                continue
            if isinstance(cell, Histogram):
                numbers = [*cell.counts, _exact(cell.sum)]
            elif family.kind == "gauge":
                cells[key] = cells.get(key, 0.0) + cell.value
                continue
            else:
                numbers = [_exact(cell.value)]
            cells[key] = list(map(int.__add__, cells[key], numbers)) if key in cells else numbers
        if cells:
            (self.gauges if family.kind == "gauge" else self.counted)[signature(family)] = cells


_CELLS = msgspec.json.Decoder(list[tuple[Labels, list[int]]])
_DECODER = msgspec.json.Decoder(tuple[dict[str, msgspec.Raw], dict[str, list[tuple[Labels, float]]]])


class ToldLabels:
    """The labels under which cells are told: users and models beyond a number are told as one."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._known: dict[str, dict[Labels, Labels]] = {}  # by family: what is once told as one stays it

    def of(self, family: Family, labels: Labels) -> Labels | None:
        """None where it is not known yet."""
        known = self._known.setdefault(family.name, {})
        if labels not in known:
            told = [
                self._shown(name, value) if name in _CAPPED else value
                for name, value in zip(family.labels, labels, strict=True)
            ]
            if None in told:
                return None
            known[labels] = tuple(told)  # type: ignore[arg-type]
        return known[labels]


class Sums:
    """Tables of what several gateways have counted. They are kept: their lines' beginnings are most of the work."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}  # by family

    async def show(self, total: Snapshot, own: Iterable[Table]) -> None:
        """Takes a total over, in the families of one's own tables; exemplars are one's own."""
        for table in own:
            family = table.family if table.family.labels else _as_told(total, table.family)
            if isinstance(table, Histograms):
                self.tables[family.name] = await self._histograms(table, total.counted.get(signature(family), {}))
                continue
            found = Counts(family)
            if family.kind == "gauge":
                for labels, value in total.gauges.get(signature(family), {}).items():
                    found.cell(*labels).value = value
            else:
                async for labels, (number,) in _in_turns(total.counted.get(signature(family), {})):
                    found.cell(*labels).value = _shown(number)
            self.tables[family.name] = found

    async def _histograms(self, own: Histograms, cells: Mapping[Labels, list[int]]) -> Histograms:
        found = self.tables.get(own.family.name)
        if not isinstance(found, Histograms) or found.family != own.family:
            found = Histograms(own.family)
        async for labels, numbers in _in_turns(cells):
            cell = found.cell(*labels)
            cell.counts, cell.sum = numbers[:-1], _shown(numbers[-1])
            if labels in own.cells:
                cell.exemplars = own.cells[labels].exemplars
        return found


async def _in_turns(cells: Mapping[Labels, Any]) -> AsyncIterator[tuple[Labels, Any]]:
    """All of them; others get the event loop in between."""
    for number, found in enumerate(list(cells.items()), 1):
        yield found
        if not number % _CELLS_A_TURN:
            await asyncio.sleep(0)


@cache
def signature(family: Family) -> str:
    """The same for all gateways whose family has these labels and buckets: those of another version are no sum."""
    form = hashlib.sha256(repr(family.buckets).encode()).hexdigest()[:8] if family.buckets else ""
    return f"{family.name} {','.join(family.labels)} {form}"


def _as_told(total: Snapshot, family: Family) -> Family:
    """With its labels: prometheus_client tells none of a family that has no samples yet."""
    for key in (*total.counted, *total.gauges):
        name, labels, _ = key.split(" ")
        if name == family.name and labels:
            return replace(family, labels=tuple(labels.split(",")))
    return family


def of_process(registry: CollectorRegistry) -> Iterable[Counts]:
    """Our own series in prometheus_client's registry, as tables; without those of an engine, which may be shared."""
    for metric in registry.collect():
        if not metric.name.startswith("synthia_") or metric.type not in ("counter", "gauge"):
            continue
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        samples = [sample for sample in metric.samples if sample.name == name]
        names = tuple(samples[0].labels) if samples else ()
        if "engine" in names:
            continue
        table = Counts(Family(name, "counter" if metric.type == "counter" else "gauge", names, metric.documentation))
        for sample in samples:
            table.cell(*(sample.labels[label] for label in names)).value = sample.value
        yield table


def _exact(value: float) -> int:
    return round(value * _PARTS)


def _shown(number: int) -> float:
    whole, rest = divmod(number, _PARTS)
    return number / _PARTS if rest else whole
