"""How much of the engine is taken: the tokens that running requests hold in its KV cache, and their number."""

import math

from synthia_vllm.engine.port import Capacity

_LEARNING_RATE = 0.1
_MAX_USERS = 10_000  # whose usual length is remembered
# Of both capacities, kept for users far below their share, so that they need not wait for another's end.
_NEWCOMERS_SHARE = 1 / 16


class Room:
    """Keeps the tokens in flight near what the KV cache holds.

    A request counts with its prompt and with the longer of what it has generated and what its user's requests of late
    generated (never more than it may): counting with the most it may would leave most of the cache empty, since replies
    rarely get that long. Where the guess was too low, vLLM preempts and recomputes; nothing fails.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.tokens = 0
        self.requests = 0
        self._mean_generated: dict[str, float] = {}  # by user
        self._mean_of_all: float | None = None  # for a user not seen before

    def held_by(self, prompt: int, generated: int) -> int:
        """Tokens of cache that a request takes, whole blocks."""
        block = self.capacity.block
        return -(-(prompt + generated) // block) * block

    def expected_generated(self, user: str, most: int, requests: int = 1) -> int:
        """By requests that may generate so much between them."""
        mean = self._mean_generated.get(user, self._mean_of_all)
        return most if mean is None else min(most, math.ceil(mean * requests))

    def fits(self, tokens: int, *, newcomer: bool) -> bool:
        """Whether one more request would find room. An empty engine takes anything."""
        if self.requests == 0:
            return True
        share = 1.0 if newcomer else 1.0 - _NEWCOMERS_SHARE
        most_tokens, most_requests = self.capacity.tokens, self.capacity.requests
        if most_requests is not None and self.requests >= max(1, int(most_requests * share)):
            return False
        return most_tokens is None or self.tokens + tokens <= most_tokens * share

    def share(self, tokens: int, requests: int) -> float:
        """The part of what is in the engine that these are, of tokens or requests, whichever is more."""
        return max(tokens / self.tokens, requests / self.requests) if self.tokens else 0.0

    def take(self, tokens: int) -> None:
        self.tokens += tokens
        self.requests += 1

    def grow(self, tokens: int) -> None:
        self.tokens += tokens

    def give_back(self, tokens: int) -> None:
        self.tokens -= tokens
        self.requests -= 1

    def learn(self, user: str, generated: int) -> None:
        """What a request came to, for the guess about the user's next.

        One whose client left early counts like any other: the guess is of how much a request holds until it is gone,
        and leaving is a way to be gone. As a lower bound of what would have come, it would say that he who always
        leaves holds all that he asked for.
        """
        if len(self._mean_generated) >= _MAX_USERS and user not in self._mean_generated:
            self._mean_generated.pop(next(iter(self._mean_generated)))
        mean = self._mean_generated.get(user, float(generated))
        self._mean_generated[user] = mean + _LEARNING_RATE * (generated - mean)
        of_all = float(generated) if self._mean_of_all is None else self._mean_of_all
        self._mean_of_all = of_all + _LEARNING_RATE * (generated - of_all)
