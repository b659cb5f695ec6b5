"""What the engines tell of themselves, over their lives: a sum over all never falls and never jumps.

A counter of a process that is gone stands still under its own `replica` label, so that `sum()` keeps it and `rate()`
sees no change. A process that starts anew under the same name goes on where the old one stopped. When many are gone,
all of them are put together under one new label, `gone-1`, then `gone-2`, …: a series that is born makes no rate, and
the sum stays the same. (Adding them to a series that is there already would be a spike.) Gauges go with the process.
"""

import re
from collections.abc import Iterator

from synthia_vllm.metrics.cells import escape
from synthia_vllm.metrics.exposition import Block, read_page, sample_lines
from synthia_vllm.metrics.repair import without_negative_sums

PREFIXES = ("vllm:",)
MOST_GONE = 32  # each under a label of its own
Samples = dict[str, float]  # by name and labels
_STARTED = re.compile(r"^process_start_time_seconds (\S+)$", re.MULTILINE)


class EnginePage:
    """One engine's series under one label."""

    def __init__(self, name: str) -> None:
        self.label = f'replica="{escape(name)}"'
        self.blocks: dict[str, Block] = {}  # by family, as told last, with what earlier processes of this name counted
        self._before: dict[str, Samples] = {}
        self._last: dict[str, Samples] = {}
        self._started = ""
        self._lines: dict[str, str] = {}

    def update(self, text: str) -> None:
        """Takes a page that the engine has just sent."""
        blocks = read_page(text, PREFIXES)
        without_negative_sums(blocks)
        counted = {name: dict(_numbers(block)) for name, block in blocks.items() if block.counts}
        found = _STARTED.search(text)
        started = found[1] if found else ""
        # Also where no start is told: no counter of one process ever falls.
        if started != self._started or _any_fell(self._last, counted):
            _add(self._before, self._last)
            self._before = {name: samples for name, samples in self._before.items() if samples}
        self._last, self._started = counted, started
        for name, before in self._before.items():
            block = blocks.setdefault(name, Block(name, self.blocks[name].kind, self.blocks[name].help))
            now = dict.fromkeys(before, 0.0) | counted.get(name, {})
            block.samples = {key: repr(before.get(key, 0.0) + value) for key, value in now.items()}
        self.blocks = blocks
        self._lines = {name: sample_lines(block.samples, self.label) for name, block in blocks.items()}

    def lose(self) -> None:
        """The engine does not answer: its gauges go, its counters stay as they are."""
        self.blocks = {name: block for name, block in self.blocks.items() if block.counts}
        self._lines = {name: self._lines[name] for name in self.blocks}

    def lines(self) -> Iterator[tuple[Block, str]]:
        return ((block, self._lines[name]) for name, block in self.blocks.items())

    def value(self, name: str) -> float | None:
        """A family's samples, summed (over the engines of one process); None where it is not told."""
        block = self.blocks.get(name)
        return sum(value for _, value in _numbers(block)) if block else None


class Gone:
    """The counters of engines that are no more."""

    def __init__(self, most: int = MOST_GONE) -> None:
        self.pages: dict[str, EnginePage] = {}
        self._most = most
        self._blocks: dict[str, Block] = {}
        self._sums: dict[str, Samples] = {}
        self._generation = 0

    def add(self, name: str, page: EnginePage) -> None:
        page.lose()
        self.pages[name] = page
        if len(self.pages) > self._most:
            self._fold()

    def take_back(self, name: str) -> EnginePage | None:
        """For one that is there again."""
        return self.pages.pop(name, None)

    def lines(self) -> Iterator[tuple[Block, str]]:
        for page in self.pages.values():
            yield from page.lines()
        label = f'replica="gone-{self._generation}"'
        for name, sums in self._sums.items():
            yield self._blocks[name], sample_lines({key: repr(value) for key, value in sums.items()}, label)

    def _fold(self) -> None:
        self._generation += 1
        for page in self.pages.values():
            self._blocks |= page.blocks
            _add(self._sums, {name: dict(_numbers(block)) for name, block in page.blocks.items()})
        self.pages = {}


def _numbers(block: Block) -> Iterator[tuple[str, float]]:
    for key, value in block.samples.items():
        try:
            yield key, float(value)
        except ValueError:
            continue


def _any_fell(before: dict[str, Samples], now: dict[str, Samples]) -> bool:
    return any(
        value < before[name].get(key, 0.0)
        for name, samples in now.items()
        if name in before
        for key, value in samples.items()
    )


def _add(to: dict[str, Samples], more: dict[str, Samples]) -> None:
    for name, samples in more.items():
        sums = to.setdefault(name, {})
        for key, value in samples.items():
            sums[key] = sums.get(key, 0.0) + value
