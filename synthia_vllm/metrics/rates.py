"""Tokens a second over a window that ends now."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Counts

WINDOW_S = 10.0
TICK_S = 1.0  # how often the totals are noted; the window is that exact
_FORGET_S = 15 * 60.0

Key = tuple[str, str]  # model, replica


class Tokens:
    """What one replica has served of one model, in all."""

    __slots__ = ("generation", "prompt")

    def __init__(self) -> None:
        self.prompt: float = 0
        self.generation: float = 0


class TokenRates:
    """The gauge `synthia_tokens_per_second`: totals now less totals ten seconds ago, over the time between."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.totals: dict[Key, Tokens] = {}
        self._clock = clock
        self._noted: deque[tuple[float, dict[Key, tuple[float, float]]]] = deque([(clock(), {})])
        self._moved: dict[Key, float] = {}  # when it last did
        self._born: dict[Key, tuple[float, float]] = {}

    def tokens(self, model: str, replica: str) -> Tokens:
        """The totals to add to."""
        found = self.totals.get((model, replica))
        if found is None:
            found = self.totals[model, replica] = Tokens()
        return found

    def set(self, model: str, replica: str, prompt: float, generation: float) -> None:
        """For totals that are kept elsewhere: what there was before the first call makes no rate."""
        self._born.setdefault((model, replica), (prompt, generation))
        tokens = self.tokens(model, replica)
        tokens.prompt, tokens.generation = prompt, generation

    def tick(self) -> None:
        """To be called each second."""
        now = self._clock()
        _, before = self._noted[-1]
        totals = {key: (tokens.prompt, tokens.generation) for key, tokens in self.totals.items()}
        for key, value in totals.items():
            if before.get(key) != value:
                self._moved[key] = now
            elif now - self._moved.get(key, now) > _FORGET_S:
                del self.totals[key], self._moved[key]
                self._born.pop(key, None)
        self._noted.append((now, totals))
        while len(self._noted) > 2 and now - self._noted[1][0] >= WINDOW_S:
            self._noted.popleft()

    def rates(self) -> Iterator[tuple[Key, float, float]]:
        """Prompt and generated tokens a second, by model and replica."""
        now = self._clock()
        began, then = next((noted for noted in reversed(self._noted) if now - noted[0] >= WINDOW_S), self._noted[0])
        seconds = max(now - began, TICK_S)
        for key, tokens in self.totals.items():
            prompt, generation = then.get(key) or self._born.get(key, (0.0, 0.0))
            yield key, (tokens.prompt - prompt) / seconds, (tokens.generation - generation) / seconds

    def table(self) -> Counts:
        found = Counts(series.TOKENS_PER_SECOND)
        for (model, replica), prompt, generation in self.rates():
            found.cell(model, replica, "prompt").value = prompt
            found.cell(model, replica, "generation").value = generation
        return found
