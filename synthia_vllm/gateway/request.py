"""One request from its first byte to its bill: what is fixed, what one layer counts, and what came of it."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Literal, Protocol

from synthia_vllm.api.base import Prepared
from synthia_vllm.engine.port import Delta
from synthia_vllm.gateway.accounts import ANONYMOUS, Account
from synthia_vllm.gateway.journal.entry import Entry

# finished: the whole reply went out; cancelled: the client left; rejected: refused before the engine (4xx, 503);
# failed: upstream answered with an error or broke off; stopped: this process ended first.
Outcome = Literal["finished", "cancelled", "rejected", "failed", "stopped"]

POLLED = ("/health", "/ready", "/metrics", "/sd")  # by machines, all the time: not worth a line, a span or a count
_ROUTES_BELOW = (("/admin/", "/admin"), ("/v1/models/", "/v1/models/{id}"), ("/v1/usage/", "/v1/usage/{id}"))


@dataclass(slots=True)
class Usage:
    """What a request has of the engine, over all its sequences; `Meter` writes it. Times are `perf_counter` seconds."""

    prompt: int = 0  # an estimate until the engine tells, where no tokenizer is known here
    cached: int = 0  # of them, in the engine's prefix cache
    generated: int = 0  # all tokens of the reply, those of before included
    resumed: int = 0  # of them, generated before this gateway took the reply up
    settled: int = 0  # of them, those that were billed there
    prompt_settled: bool = False  # and whether the prompt was
    taken: bool = False  # another gateway has taken the reply up, and bills it
    dispatched: float | None = None  # handed to the engine
    accepted: bool = False  # the engine took it: nothing that it refused, or never saw, costs anything
    begun: bool = False  # something came from the engine
    first_token: float | None = None
    last_token: float | None = None
    ended: int = 0  # sequences that are whole
    completed: bool = False  # all of them
    replica: str = ""  # that generates it now, in a cluster
    told: dict[int, int] = field(default_factory=dict)  # tokens by prompt, where the engine alone can count them

    @property
    def billed_prompt(self) -> int:
        return self.prompt if self.accepted and not self.taken and not self.prompt_settled else 0

    @property
    def billed_generated(self) -> int:
        return max(0, self.generated - self.settled) if self.accepted and not self.taken else 0


@dataclass(slots=True)
class Exchange:
    """One HTTP request and what came of it. `Access` writes it, observers read it."""

    id: str  # ours, unique: the key of the ledger
    request_id: str  # the client's X-Request-Id, or `id`
    route: str
    method: str = "POST"
    account: Account = ANONYMOUS
    arrived: float = field(default_factory=perf_counter)
    arrived_at: float = field(default_factory=time)  # Unix time
    trace: Mapping[str, str] = field(default_factory=dict)  # the client's own trace headers
    body: bytes | None = None  # as the client sent it, once it was read
    model: str = ""  # asked for
    request: "Request | None" = None  # what generates; None: not known yet, or a route that generates nothing
    usage: Usage = field(default_factory=Usage)
    status: int = 0  # HTTP status sent; 0: none
    first_sent: float | None = None  # a stream's first token went to the client
    ended: float | None = None
    outcome: Outcome = "stopped"
    reason: str = ""  # of a rejection or failure, one word: what metrics and logs name it

    @property
    def named(self) -> bool:
        """Whether its client gave it an X-Request-Id."""
        return self.request_id != self.id

    @property
    def route_name(self) -> str:
        """Its route without what clients choose in it: routes are labels."""
        return next((name for prefix, name in _ROUTES_BELOW if self.route.startswith(prefix)), self.route)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until a stream's first token was sent; None where none was, as in a whole reply."""
        return self.first_sent - self.arrived if self.first_sent is not None else None

    @property
    def queue_wait(self) -> float:
        """Seconds from its arrival to its hand-over to the engine."""
        return self.usage.dispatched - self.arrived if self.usage.dispatched is not None else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What the layers above the engine are handed: fixed from here on, but for the `Usage` of its exchange."""

    id: str
    account: Account
    prepared: Prepared
    usage: Usage
    queue_timeout: float | None = None  # seconds, from X-Queue-Timeout-S
    entry: Entry | None = None  # in the journal of replies
    keeps_its_place: bool = False  # it has waited for its turn at another gateway

    @property
    def prompt_tokens(self) -> int:
        return self.prepared.prompt_tokens

    @property
    def max_generated(self) -> int:
        return self.prepared.max_generated


class Observer:
    """Is told of the same few moments of every exchange. Nothing in here may wait, be slow, or raise."""

    def opened(self, exchange: Exchange) -> None:
        """Its headers have come."""

    def sent(self, exchange: Exchange, chunks: int, tokens: int) -> None:
        """So many chunks of a stream, with so many new tokens in them, went to the client together."""

    def ended(self, exchange: Exchange) -> None:
        """All is over, whatever became of it."""


class Layer(Protocol):
    """A layer over an engine: what it yields are the deltas of all of a request's sequences."""

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]: ...
