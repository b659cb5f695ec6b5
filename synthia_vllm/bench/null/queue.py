"""The null engine's queue: who runs, who waits, and how long prompts take, as vLLM's scheduler has it.

Read in vLLM 0.29: `v1/core/sched/scheduler.py` (order, budget, statistics) and `v1/metrics/` (what is told when).
Without preemption and prefix cache.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 16  # tokens
MOST_A_STEP = 8192  # tokens: vLLM's `max_num_batched_tokens`
_LOOK_S = 0.02  # between two looks at whether a stuck engine goes on


class Told(NamedTuple):
    """What the scheduler says of itself at the end of a step."""

    running: int
    waiting: int
    blocks: int  # of the KV cache that are taken


@dataclass(slots=True, eq=False)
class Seat:
    """One request's place. `prefilled` is set when its prompt is computed."""

    prompt: int  # tokens
    prefilled: "asyncio.Future[None]" = field(repr=False)
    computed: int = 0  # of the prompt
    made: int = 0  # tokens of the reply
    began: float = 0.0  # loop time of its turn, and of its prompt's end
    computed_at: float = 0.0

    @property
    def blocks(self) -> int:
        return -(-(self.computed + self.made) // BLOCK)


class Queue:
    """Lets `max_num_seqs` requests run, the first that came first, as long as the KV cache has room for their prompts.

    max_num_seqs        None: all run, and the cache is not looked at
    prefill_s           a prompt takes so long, however long it is and whoever else is there; or
    tokens_per_second   of prefill: steps of at most 8,192 tokens, several short prompts or a part of a long one. All
                        who generate wait for a step's end, and what is told stands still until then.
    stuck               True while no step ends
    """

    def __init__(
        self,
        *,
        max_num_seqs: int | None = None,
        prefill_s: float = 0.0,
        tokens_per_second: float | None = None,
        blocks: int = 4096,
        stuck: Callable[[], bool] = lambda: False,
    ) -> None:
        self.blocks = blocks
        self.prompt_tokens = 0  # of prompts that are computed
        self.running: dict[Seat, None] = {}
        self.waiting: deque[Seat] = deque()
        self.step: asyncio.Future[None] | None = None  # the prefill step in progress
        self.in_steps = tokens_per_second is not None
        self._arrived: deque[Seat] = deque()  # during a step: the scheduler looks after it
        self._told = Told(0, 0, 0)
        self._max_num_seqs = max_num_seqs
        self._prefill_s = prefill_s
        self._rate = tokens_per_second
        self._stuck = stuck

    def arrive(self, prompt: int) -> Seat:
        """Takes a place at the end. `leave` must follow."""
        seat = Seat(prompt, asyncio.get_running_loop().create_future())
        self._arrived.append(seat)
        if self.step is None:
            self._schedule()
        return seat

    async def prefill(self, seat: Seat, gone: "asyncio.Future[None]") -> None:
        """Waits until a prompt is computed, or its client has left."""
        if not seat.prefilled.done():
            await asyncio.wait((seat.prefilled, gone), return_when=asyncio.FIRST_COMPLETED)
        if not self.in_steps and not gone.done():
            if self._prefill_s:
                await asyncio.wait((gone,), timeout=self._prefill_s)
            if not gone.done():
                self._compute(seat, seat.prompt)

    async def step_over(self, gone: "asyncio.Future[None]") -> None:
        """Waits for the end of the step in progress: who generates has its next token then."""
        if self.step is not None:
            await asyncio.wait((self.step, gone), return_when=asyncio.FIRST_COMPLETED)

    def leave(self, seat: Seat) -> None:
        self.running.pop(seat, None)
        for places in (self.waiting, self._arrived):
            if seat in places:
                places.remove(seat)
        if self.step is None:
            self._schedule()

    def told(self) -> Told:
        """What `/metrics` tells now: in the middle of a step, what was so at the last one's end."""
        return self._now() if self.step is None else self._told

    @property
    def unseen(self) -> int:
        """Requests that came during a step."""
        return len(self._arrived)

    def _now(self) -> Told:
        return Told(len(self.running), len(self.waiting), min(self.blocks, sum(seat.blocks for seat in self.running)))

    def _schedule(self) -> None:
        """Lets run who has room, and begins a step if there are prompts to compute."""
        self._told = self._now() if self.in_steps else self._told
        self.waiting.extend(self._arrived)
        self._arrived.clear()
        chunks: list[tuple[Seat, int]] = []
        budget = MOST_A_STEP
        if self.in_steps:
            unfinished = [seat for seat in self.running if seat.computed < seat.prompt]
            budget -= len(self.running) - len(unfinished)
            for seat in unfinished:
                if budget <= 0:
                    break
                chunks.append((seat, min(budget, seat.prompt - seat.computed)))
                budget -= chunks[-1][1]
        while self.waiting and budget > 0 and self._has_room(self.waiting[0]):
            seat = self.waiting.popleft()
            self.running[seat] = None
            seat.began = asyncio.get_running_loop().time()
            if self.in_steps:
                chunks.append((seat, min(budget, seat.prompt)))
                budget -= chunks[-1][1]
            else:
                seat.prefilled.set_result(None)
        if chunks and self._rate:
            loop = asyncio.get_running_loop()
            self.step = loop.create_future()
            loop.call_later(sum(tokens for _, tokens in chunks) / self._rate, self._end_step, chunks)

    def _end_step(self, chunks: list[tuple[Seat, int]]) -> None:
        if self._stuck():
            asyncio.get_running_loop().call_later(_LOOK_S, self._end_step, chunks)
            return
        assert self.step is not None
        self.step.set_result(None)
        self.step = None
        for seat, tokens in chunks:
            if seat in self.running:
                self._compute(seat, tokens)
        self._schedule()

    def _compute(self, seat: Seat, tokens: int) -> None:
        seat.computed += tokens
        if seat.computed >= seat.prompt:
            # With the first token: vLLM counts a prompt when it is whole.
            self.prompt_tokens += seat.prompt
            seat.computed_at = asyncio.get_running_loop().time()
            if not seat.prefilled.done():
                seat.prefilled.set_result(None)

    def _has_room(self, seat: Seat) -> bool:
        if self._max_num_seqs is None or not self.running:
            return True
        if len(self.running) >= self._max_num_seqs:
            return False
        taken = sum(-(-(max(other.prompt, other.computed) + other.made) // BLOCK) for other in self.running)
        return taken + -(-seat.prompt // BLOCK) <= self.blocks
