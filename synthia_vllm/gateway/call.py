"""One request from its first byte to its bill: made by `Access`, carried by the ASGI scope, read by all layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from starlette.types import Scope

from synthia_vllm.gateway.accounts import ANONYMOUS, Account

if TYPE_CHECKING:
    from synthia_vllm.gateway.delivery import Delivery
    from synthia_vllm.gateway.tracing import Trace

_SCOPE_KEY = "synthia.call"

# finished: the whole reply went out; cancelled: the client left; rejected: refused before the engine (4xx, 503);
# failed: upstream answered with an error or broke off; stopped: this process ended first.
Outcome = Literal["finished", "cancelled", "rejected", "failed", "stopped"]


@dataclass(slots=True)
class Call:
    """What the layers know of one request. Times are `perf_counter` seconds unless they say otherwise."""

    id: str  # ours, unique: the key of the ledger
    request_id: str  # the client's X-Request-Id, or `id`
    route: str
    account: Account = ANONYMOUS
    arrived: float = field(default_factory=perf_counter)
    arrived_at: float = field(default_factory=time)  # Unix time
    body: bytes | None = None  # as the client sent it, once `Access` has read it
    request: dict[str, Any] | None = None  # the decoded body
    changed: bool = False  # `request` is no longer what `body` says
    model: str = ""
    choices: int = 1  # replies asked for with one prompt, times prompts
    prompt_tokens: int = 0  # an estimate until the engine tells
    max_generated: int = 0  # the most that the reply can have, over all its choices
    wants_usage: bool = False  # the client asked for usage at a stream's end
    wants_continuous_usage: bool = False  # and in each chunk
    queue_timeout: float | None = None  # seconds, from X-Queue-Timeout-S
    generated: int = 0  # so far, by the engine's own count where it gives one
    queue_wait: float = 0.0  # seconds
    dispatched: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    status: int = 0  # HTTP status sent; 0: none
    completed: bool = False  # the engine said that the reply was whole
    outcome: Outcome = "stopped"
    replica: str = ""  # that answers it, in a cluster
    resumes: int = 0  # how often it went on elsewhere
    reason: str = ""  # of a rejection or failure, one word: what metrics and logs name it
    on_tokens: Callable[[int], None] | None = None  # called with each number of newly generated tokens
    prompt_counted: bool = False  # `prompt_tokens` is the engine's own count
    delivery: "Delivery | None" = None  # what the client gets, and when
    trace: "Trace | None" = None

    def encode(self) -> bytes:
        """The body for upstream: the client's own bytes unless a layer changed the request."""
        assert self.body is not None
        return msgspec.json.encode(self.request) if self.changed else self.body

    def dispatch(self) -> None:
        """Notes that the engine is asked now, if it is the first time."""
        if self.dispatched is not None:
            return
        self.dispatched = perf_counter()
        self.queue_wait = self.dispatched - self.arrived

    def add_tokens(self, count: int) -> None:
        """Notes tokens that the engine has just sent."""
        if count <= 0:
            return
        now = perf_counter()
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        self.generated += count
        if self.on_tokens is not None:
            self.on_tokens(count)

    @property
    def billed(self) -> bool:
        """Whether the engine worked for it: what never reached it, or what it refused, costs nothing."""
        return self.dispatched is not None and self.status < 400

    @property
    def billed_prompt(self) -> int:
        return self.prompt_tokens if self.billed else 0

    @property
    def billed_generated(self) -> int:
        return self.generated if self.billed else 0


def attach(scope: Scope, call: Call) -> None:
    scope[_SCOPE_KEY] = call


def call_of(scope: Scope) -> Call | None:
    """The record of a request; None where no `Access` layer is above (a layer used alone)."""
    call: Call | None = scope.get(_SCOPE_KEY)
    return call
