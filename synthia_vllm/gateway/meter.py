"""The layer next to the engine: counts what it generates, sequence by sequence and delta by delta."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from time import perf_counter

from synthia_vllm.engine.port import Delta, Generates
from synthia_vllm.errors import UpstreamLost
from synthia_vllm.gateway.request import Request


class Meter:
    """Writes the `Usage` of a request. Adds nothing to the reply and never waits.

    It counts where the engine's deltas come in, and what it says was never taken, so that nothing is missing of a
    request that is cut meanwhile. What the engine refuses before its first delta was never accepted, and costs
    nothing; whoever leaves while the engine reads the prompt pays for the prompt.
    """

    def __init__(self, engine: Generates, *, clock: Callable[[], float] = perf_counter) -> None:
        self.engine = engine
        self.clock = clock

    async def generate(self, request: Request, number: int = 0) -> AsyncGenerator[Delta, None]:
        """The deltas of one of a request's sequences."""
        usage, prepared, clock = request.usage, request.prepared, self.clock
        prompt, reply = divmod(number, prepared.replies)
        finished = False

        def untaken(count: int) -> None:
            usage.generated += count

        if usage.dispatched is None:
            usage.dispatched = clock()
            usage.accepted = True
        try:
            generation = replace(prepared.sequences[number], on_untaken=untaken)
            async with aclosing(self.engine.generate(generation)) as deltas:
                async for delta in deltas:
                    if count := len(delta.ids):
                        now = clock()
                        if usage.first_token is None:
                            usage.first_token = now
                        usage.last_token = now
                        usage.generated += count
                        if delta.again:
                            usage.resumed += count
                    if delta.cached and not reply:
                        usage.cached += delta.cached
                    if delta.prompt_tokens is not None:
                        usage.told[prompt] = delta.prompt_tokens
                        if len(usage.told) * prepared.replies == len(prepared.sequences):
                            usage.prompt = sum(usage.told.values())
                    usage.begun = usage.begun or not delta.note
                    if delta.finish is not None:
                        usage.ended += 1
                        usage.completed = usage.ended == len(prepared.sequences)
                        finished = True
                    delta.sequence = number
                    yield delta
            _check_end(finished)
        except Exception:
            usage.accepted = usage.begun
            raise


def _check_end(finished: bool) -> None:
    if not finished:
        raise UpstreamLost("the engine broke off a reply without a word")
