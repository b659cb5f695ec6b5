"""The layer that journals what is generated."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from synthia_vllm.engine.port import Delta
from synthia_vllm.gateway.journal.store import Journals
from synthia_vllm.gateway.request import Layer, Request


class Journaling:
    """Notes each delta of a request that has an entry in the journal; others pass untouched.

    It is below limits and fair sharing, which settle by what is billed: when it ends, it is known whether that is
    billed here, or by the gateway that has taken the reply up.
    """

    def __init__(self, engine: Layer, journals: Journals) -> None:
        self.engine = engine
        self.journals = journals

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        return self.engine.generate(request) if request.entry is None else self._journaled(request)

    async def _journaled(self, request: Request) -> AsyncGenerator[Delta, None]:
        entry = request.entry
        assert entry is not None
        self.journals.begin(entry)
        try:
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    if not delta.note and not delta.again:
                        entry.add(delta)
                    yield delta
        finally:
            await self.journals.close(entry, request.usage)
