"""The layer that runs all of a request's sequences, several at once."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from synthia_vllm.engine.port import Delta
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.request import Request


class Sequences:
    """Turns the engine's one sequence a generation into one stream of a request's deltas, each with its number.

    A request for several ends when all have ended, or with the first error.
    """

    def __init__(self, engine: Meter) -> None:
        self.engine = engine

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        return self.engine.generate(request) if len(request.prepared.sequences) == 1 else self._together(request)

    async def _together(self, request: Request) -> AsyncGenerator[Delta, None]:
        deltas: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()  # None: one has ended

        async def run(number: int) -> None:
            try:
                async with aclosing(self.engine.generate(request, number)) as one:
                    async for delta in one:
                        deltas.put_nowait(delta)
            except Exception as error:
                deltas.put_nowait(error)
            else:
                deltas.put_nowait(None)

        tasks = [asyncio.create_task(run(number)) for number in range(len(request.prepared.sequences))]
        try:
            running = len(tasks)
            while running:
                found = await deltas.get()
                if found is None:
                    running -= 1
                elif isinstance(found, Exception):
                    raise found
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
