"""Prometheus' text format, read and written: pages of several engines become one.

The reader is a line splitter, not prometheus_client's parser, which takes about fifteen times as long: sixteen engines'
pages are read on the event loop that streams. It reads what prometheus_client writes (text 0.0.4), which is what vLLM
sends; a test compares the two.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from synthia_vllm.metrics.cells import Table

TEXT = b"text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
_PIECES_A_TURN = 64  # then others get the event loop


@dataclass(slots=True)
class Block:
    """One family of a page. `name` as in the text format: a counter's ends in `_total`."""

    name: str
    kind: str
    help: str  # escaped, as it came
    samples: dict[str, str] = field(default_factory=dict)  # value by name and labels, both as they came

    @property
    def counts(self) -> bool:
        """Whether its samples only grow."""
        return self.kind in ("counter", "histogram", "summary")


def read_page(text: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, Block]:
    """The families whose names start with one of `prefixes`. Creation times (`…_created`) are left out."""
    blocks: dict[str, Block] = {}
    block: Block | None = None
    helps: dict[str, str] = {}
    for line in text.split("\n"):
        if line.startswith("#"):
            word, _, rest = line[2:].partition(" ")
            name, _, tail = rest.partition(" ")
            if word == "HELP":
                helps[name] = tail
            elif word == "TYPE":
                block = None
                if name.startswith(prefixes) and not (tail == "gauge" and name.endswith("_created")):
                    block = blocks.setdefault(name, Block(name, tail, helps.get(name, "")))
        elif block is not None and line:
            end = line.rfind("}") + 1 or line.find(" ")
            block.samples[line[:end]] = line[end + 1 :].partition(" ")[0]
    return blocks


def with_label(key: str, label: str) -> str:
    """A sample's name and labels with one more label in front; `label` is `name="value"`.

    A label of that name that was there is kept as `exported_…`, as Prometheus does it.
    """
    name, brace, labels = key.partition("{")
    if not brace or labels == "}":
        return f"{name}{{{label}}}"
    taken = label[: label.index('"') + 1]
    if labels.startswith(taken):
        labels = f"exported_{labels}"
    labels = labels.replace(f",{taken}", f",exported_{taken}")
    return f"{name}{{{label},{labels}"


class Exposition:
    """One page put together: the families in the order in which they came, each with one HELP and one TYPE.

    Where two pages give one name different kinds, as engines of two versions may, the first stands and the other's
    samples are left out.
    """

    def __init__(self, openmetrics: bool) -> None:
        self.openmetrics = openmetrics
        self._families: dict[str, tuple[str, list[str]]] = {}  # kind, pieces with the header first
        self._since_yield = 0

    async def add_table(self, table: Table) -> None:
        family = table.family
        pieces = self._pieces(family.name, family.kind, family.help)
        if pieces is None:
            return
        for piece in table.pieces(self.openmetrics):
            pieces.append(piece)
            await self._breathe()

    async def add_blocks(self, blocks: Iterable[tuple[Block, str]]) -> None:
        """Families read elsewhere, each with its sample lines."""
        for block, lines in blocks:
            pieces = self._pieces(block.name, block.kind, block.help) if lines else None
            if pieces is not None:
                pieces.append(lines)
            await self._breathe()

    async def bytes(self) -> bytes:
        """The whole page."""
        parts = []
        for _, pieces in self._families.values():
            if len(pieces) > 1:  # a family without samples has no place in OpenMetrics, nor any use
                parts.append("".join(pieces).encode())
                await asyncio.sleep(0)
        return b"".join(parts) + (b"# EOF\n" if self.openmetrics else b"")

    def _pieces(self, name: str, kind: str, help_text: str) -> list[str] | None:
        found = self._families.get(name)
        if found is None:
            shown = name
            if self.openmetrics:
                if kind == "untyped":
                    kind = "unknown"
                elif kind == "counter":
                    shown, kind = (name[:-6], kind) if name.endswith("_total") else (name, "unknown")
            header = f"# HELP {shown} {help_text}\n# TYPE {shown} {kind}\n"
            found = self._families[name] = (kind, [header])
            return found[1]
        same = kind == found[0] or (self.openmetrics and found[0] == "unknown")
        return found[1] if same else None

    async def _breathe(self) -> None:
        self._since_yield += 1
        if self._since_yield >= _PIECES_A_TURN:
            self._since_yield = 0
            await asyncio.sleep(0)


def sample_lines(samples: dict[str, str], label: str = "") -> str:
    if not label:
        return "".join(f"{key} {value}\n" for key, value in samples.items())
    return "".join(f"{with_label(key, label)} {value}\n" for key, value in samples.items())
