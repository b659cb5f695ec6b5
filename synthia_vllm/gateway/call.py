"""One request from its first byte to its bill: made by `Access`, carried by the ASGI scope, read by all layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any, Literal

from starlette.types import Scope

from synthia_vllm.gateway.accounts import ANONYMOUS, Account

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
    body: bytes | None = None  # as the client sent it, once `Intake` has read it
    request: dict[str, Any] | None = None  # the decoded body
    model: str = ""
    prompt_tokens: int = 0  # an estimate until the engine tells
    max_generated: int = 0  # the most that the reply can have, over all its choices
    generated: int = 0  # so far, by the engine's own count where it gives one
    queue_wait: float = 0.0  # seconds
    dispatched: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    status: int = 0  # HTTP status sent; 0: none
    outcome: Outcome = "stopped"
    reason: str = ""  # of a rejection or failure, one word: what metrics and logs name it
    on_tokens: Callable[[int], None] | None = None  # called with each number of newly generated tokens

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
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated


def attach(scope: Scope, call: Call) -> None:
    scope[_SCOPE_KEY] = call


def call_of(scope: Scope) -> Call | None:
    """The record of a request; None where no `Access` layer is above (a layer used alone)."""
    call: Call | None = scope.get(_SCOPE_KEY)
    return call
