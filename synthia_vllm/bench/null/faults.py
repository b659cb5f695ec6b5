"""Faults of the null engine, on order: at its start or while it runs (`POST /fault`)."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from synthia_vllm.bench.null.tokens import text_of

# What vLLM 0.29 says when its EngineCore has died: in the stream of a running request, and as a 500 to new ones.
ENGINE_DEAD = (
    b'{"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", '
    b'"type": "InternalServerError", "param": null, "code": 500}}'
)
ENGINE_DEAD_EVENT = b"data: " + ENGINE_DEAD + b"\n\ndata: [DONE]\n\n"
_LOOK_S = 0.02

MetricsLie = Literal["still", "hang", "error"]
SseForm = Literal["crlf", "ids", "split", "html", "null_choices"]


@dataclass
class Faults:
    """Which faults are on.

    break_after   the connection of a stream breaks in place of this token of its reply
    end_after     a stream ends in place of this token as if all was sent, without finish_reason, usage and [DONE]
    stall_after   in place of this token of its reply a stream falls silent, and its connection stays
    hang          nothing is sent to anyone, canaries included; `/health` still answers, as a hung vLLM's does
    stuck         no step of the engine ends: no token, no count moves; HTTP and `/metrics` answer, as vLLM's do then
    metrics       what `/metrics` does: still (tokens are not counted, nor does the cache fill), hang (no answer), error
                  (500)
    status        every request is answered with this HTTP status (an error)
    dead          the engine behind the server has died: an error event and `[DONE]` in every stream, 500 to others
    poison        a prompt with this text in it makes the process exit
    poison_at     not at once, but in place of this token of its reply, wherever the reply began
    poison_after  or in place of this token of those made here, so that it gets on a little wherever it comes
    usage_lie     so many tokens more are told than were generated
    refuse_s      connections are refused for so long, once
    drain_s       after so long the port is closed; the process exits when what runs has ended, as a Serve replica does
    sse           how else streams of `/v1/completions` are written: crlf (as line ends), ids (with `id:` and
                  `event:` lines and comments), split (each JSON in several `data:` lines), html (a page of a proxy,
                  status 200), null_choices (`choices: null` in one chunk)
    """

    break_after: int | None = None
    end_after: int | None = None
    stall_after: int | None = None
    hang: bool = False
    stuck: bool = False
    metrics: MetricsLie | None = None
    status: int | None = None
    dead: bool = False
    poison: str | None = None
    poison_at: int = 0
    poison_after: int = 0
    usage_lie: int = 0
    refuse_s: float | None = None
    drain_s: float | None = None
    sse: SseForm | None = None

    def __post_init__(self) -> None:
        self._note()

    def change(self, wanted: dict[str, Any]) -> None:
        """Switches faults on and off. Raises ValueError for a name that is none."""
        unknown = set(wanted) - {field.name for field in fields(self)}
        if unknown:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        for name, known in (("sse", get_args(SseForm)), ("metrics", get_args(MetricsLie))):
            if wanted.get(name) is not None and wanted[name] not in known:
                raise ValueError(f"{name} is none of {', '.join(known)}")
        for name, value in wanted.items():
            setattr(self, name, value)
        self._note()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    async def hold(self, gone: "asyncio.Future[None]") -> None:
        """Waits while nothing is to be generated."""
        while (self.hang or self.stuck) and not gone.done():
            await asyncio.wait((gone,), timeout=_LOOK_S)

    async def strike(self, number: int, gone: "asyncio.Future[None]") -> bool:
        """Called before each token of a stream; True if the engine is dead. Raises ConnectionResetError."""
        while (self.hang or self.stuck or number == self.stall_after) and not gone.done():
            await asyncio.wait((gone,), timeout=_LOOK_S)
        if number == self.break_after:
            raise ConnectionResetError("a fault, as ordered")
        return self.dead

    def is_poison(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt has the poison in it."""
        return self.poison is not None and self.poison in text_of(prompt)

    def die(self) -> None:
        """As a segmentation fault would: nothing is said, nothing is cleaned up."""
        os._exit(1)

    def _note(self) -> None:
        # Read before each token: one attribute, so that an engine without faults is as fast as it was.
        at_a_token = (self.break_after, self.end_after, self.stall_after)
        self.in_streams = self.hang or self.stuck or self.dead or any(number is not None for number in at_a_token)
