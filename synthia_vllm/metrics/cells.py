"""Where the gateway counts: plain numbers that its event loop adds to, without locks, and their text for Prometheus.

prometheus_client's own counters take a lock and look their labels up each time; that is most of what a streamed chunk
may cost. Only the event loop writes here. Formats: Prometheus text 0.0.4, and OpenMetrics 1.0 where exemplars are
wanted.
"""

from bisect import bisect_left
from collections.abc import Iterator
from time import time
from typing import Protocol

from synthia_vllm.metrics.series import OTHER, Family

_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})
_EXEMPLAR_CHARACTERS = 100  # OpenMetrics allows 128 for an exemplar's names and values together


class Cap:
    """The values that a label may have: the first so many as they come, the rest are `other`."""

    def __init__(self, limit: int, known: tuple[str, ...] = ()) -> None:
        self.names: dict[str, None] = dict.fromkeys(known)
        self.limit = limit

    def admit(self, name: str) -> str:
        if name in self.names:
            return name
        if not name or len(self.names) >= self.limit:
            return OTHER
        self.names[name] = None
        return name

    def known(self, name: str) -> str:
        """For a name that nothing vouches for: itself only if it has been admitted."""
        return name if name in self.names else OTHER


class Count:
    """A number that a series shows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """Observations by upper bound. `counts` has one place more than `bounds`, for those above all."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, str] = {}  # by place: the last one, as text

    def observe(self, value: float, request_id: str = "") -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        if request_id:
            self.exemplify(value, request_id)

    def exemplify(self, value: float, request_id: str) -> None:
        """Names a request for a value that has been observed."""
        label = escape(request_id[:_EXEMPLAR_CHARACTERS])
        self.exemplars[bisect_left(self.bounds, value)] = f' # {{request_id="{label}"}} {value!r} {time():.3f}'


class Table(Protocol):
    """All label sets of one family."""

    family: Family

    def pieces(self, openmetrics: bool) -> Iterator[str]:
        """The sample lines, one text a label set, each line with its end."""
        ...


class Counts:
    """Counters or gauges of one family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.cells: dict[tuple[str, ...], Count] = {}

    def cell(self, *labels: str) -> Count:
        found = self.cells.get(labels)
        if found is None:
            found = self.cells[labels] = Count()
        return found

    def pieces(self, openmetrics: bool) -> Iterator[str]:
        for labels, cell in list(self.cells.items()):
            yield f"{self.family.name}{label_text(self.family.labels, labels)} {cell.value!r}\n"


def single(family: Family, value: float) -> Counts:
    """A family without labels."""
    found = Counts(family)
    found.cell().value = value
    return found


class Histograms:
    """Histograms of one family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.cells: dict[tuple[str, ...], Histogram] = {}
        self._prefixes: dict[tuple[str, ...], tuple[str, ...]] = {}  # what stays the same of a label set's lines

    def cell(self, *labels: str) -> Histogram:
        found = self.cells.get(labels)
        if found is None:
            found = self.cells[labels] = Histogram(self.family.buckets)
        return found

    def pieces(self, openmetrics: bool) -> Iterator[str]:
        for labels, cell in list(self.cells.items()):
            if labels not in self._prefixes:
                self._prefixes[labels] = self._prefix(labels)
            *buckets, name, tail = self._prefixes[labels]
            running, lines = 0, []
            for place, (prefix, count) in enumerate(zip(buckets, cell.counts, strict=True)):
                running += count
                exemplar = cell.exemplars.get(place, "") if openmetrics else ""
                lines.append(f"{prefix}{running}{exemplar}\n")
            lines.append(f"{name}_count{tail} {running}\n{name}_sum{tail} {cell.sum!r}\n")
            yield "".join(lines)

    def _prefix(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        name, names = self.family.name, self.family.labels
        bounds = [*(repr(float(bound)) for bound in self.family.buckets), "+Inf"]
        texts = [f"{name}_bucket{label_text((*names, 'le'), (*labels, bound))} " for bound in bounds]
        return (*texts, name, label_text(names, labels))


def escape(value: str) -> str:
    """A label's value, as it stands between quotation marks."""
    return value.translate(_ESCAPES)


def label_text(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = ",".join(f'{name}="{escape(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""
