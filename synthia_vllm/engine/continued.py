"""Makes any engine go on behind what another gateway has told of a sequence."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from synthia_vllm.engine.port import Delta, Engine, Generation
from synthia_vllm.engine.resume import Replayed, resume, stateful
from synthia_vllm.engine.transcript import Transcript


class Continued:
    """Tells again what a generation has `said`, and has the engine generate the rest. The text is made of the ids.

    Generations of which nothing was said are the engine's own. Raises UpstreamLost where the engine was to replay what
    was said, and says something else.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        return self._continued(generation) if generation.said else self.engine.generate(generation)

    async def _continued(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        transcript = Transcript(generation, self.engine.tokenizer)
        known: list[int] = []
        for ids, finish, reason in generation.said:
            delta = _retold(transcript, Delta(ids, "", finish, reason, again=True))
            known += delta.ids
            yield delta
            if delta.finish is not None:
                return
        if len(known) >= generation.sampling.max_tokens:
            yield Delta(finish="length")
            return
        rest = resume(generation, generation.prompt, known, whole=transcript.whole)
        replayed = Replayed(known if stateful(generation.sampling) else ())
        async with aclosing(self.engine.generate(rest)) as deltas:
            async for delta in deltas:
                if delta.note:
                    yield delta
                    continue
                if skipped := replayed.skip(delta.ids, ends=delta.finish is not None):
                    delta.ids = delta.ids[skipped:]
                    if not delta.ids and delta.finish is None:
                        continue
                if delta.cached is not None:  # to the engine, what was said may have been prompt
                    delta.cached = min(delta.cached, len(generation.prompt))
                told = _retold(transcript, delta)
                yield told
                if told.finish is not None:
                    return


def _retold(transcript: Transcript, delta: Delta) -> Delta:
    """The delta with its text, and with its end where a stop string ends it that the engine does not know of."""
    stopped = delta.finish == "stop" and not isinstance(delta.stop_reason, str)
    delta.text, stop, used = transcript.take(delta.ids, stopped=stopped)
    delta.ids = delta.ids[:used]
    if isinstance(stop, str):
        delta.finish, delta.stop_reason = "stop", stop
    return delta
