"""The layer that runs all of a request's sequences, several at once."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from synthia_vllm.engine.port import Delta
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.request import Request

# So much is done in one turn of the event loop, which is everybody's: a request may have a thousand sequences.
_SEQUENCES_A_TURN = 8  # begun or left: an engine takes up to half a millisecond for each
_DELTAS_A_TURN = 128


class Sequences:
    """Turns the engine's one sequence a generation into one stream of a request's deltas, each with its number.

    Sequences are begun in their order. A request for several ends when all have ended, or with the first error: then
    those under way are left, and the others never begun.
    """

    def __init__(self, engine: Meter) -> None:
        self.engine = engine

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        return self.engine.generate(request) if len(request.prepared.sequences) == 1 else self._together(request)

    async def _together(self, request: Request) -> AsyncGenerator[Delta, None]:
        found: deque[Delta | Exception | None] = deque()  # None: one has ended
        arrived = asyncio.Event()

        async def run(number: int) -> None:
            try:
                async with aclosing(self.engine.generate(request, number)) as deltas:
                    async for delta in deltas:
                        found.append(delta)
                        arrived.set()
            except Exception as error:
                found.append(error)
            else:
                found.append(None)
            arrived.set()

        numbers = range(len(request.prepared.sequences))
        tasks: list[asyncio.Task[None]] = []
        running = len(numbers)
        try:
            while running:
                for number in numbers[len(tasks) : len(tasks) + _SEQUENCES_A_TURN]:
                    tasks.append(asyncio.create_task(run(number)))
                if found or len(tasks) < len(numbers):
                    await asyncio.sleep(0)
                else:
                    arrived.clear()
                    await arrived.wait()
                for _ in range(min(len(found), _DELTAS_A_TURN)):
                    one = found.popleft()
                    if one is None:
                        running -= 1
                    elif isinstance(one, Exception):
                        raise one
                    else:
                        yield one
        finally:
            await _leave(tasks)


async def _leave(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels what still runs, and waits for its end; at once where this is cancelled meanwhile."""
    running = [task for task in tasks if not task.done()]
    try:
        for at, task in enumerate(running, start=1):
            task.cancel()
            if not at % _SEQUENCES_A_TURN:
                await asyncio.sleep(0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
