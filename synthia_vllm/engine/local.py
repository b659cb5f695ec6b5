"""vLLM's engine in this process, behind the port. Imports vLLM when an engine is asked for the first time."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import structlog

from synthia_vllm.engine import late_logprobs
from synthia_vllm.engine.port import Capacity, Delta, Generation, Position, Sampling, TokenLogprob
from synthia_vllm.engine.private_vllm import answered, refusals
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import Overloaded, RequestError, UpstreamLost

_READY_DEADLINE_S = 5.0
_UNAVAILABLE = 503
# What vLLM lets through and then can't send to its engine.
_NOT_REPRESENTABLE = (OverflowError, UnicodeEncodeError, TypeError, RecursionError)
_LONG_DELTA = 256  # tokens with log-probabilities: more are read in a thread, the event loop is everybody's
_CONTEXT_TOKENS = 8  # that a tokenizer may need before a token to know its text

_UNKNOWN = Position(TokenLogprob(-1, "", -9999.0), ())  # where vLLM tells no log-probability

_log = structlog.get_logger(__name__)


class LocalEngine:
    """Generates with vLLM's AsyncLLM. One delta a step of the engine; several where the reader was slow come as one.

    vLLM makes the text (its detokenizer runs in this process in any case) and finds the stop strings.
    """

    def __init__(self, llm: Any, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.tokenizer: Tokenizer | None = tokenizer
        self.context: int | None = llm.model_config.max_model_len
        self.root: str | None = llm.model_config.model
        self._llm = llm
        self._names = tuple(names)
        self._canaries = 0

    def capacity(self) -> Capacity:
        """What the engine holds at once, by its own figures."""
        cache, scheduler = self._llm.vllm_config.cache_config, self._llm.vllm_config.scheduler_config
        return Capacity(cache.num_gpu_blocks * cache.block_size, scheduler.max_num_seqs, cache.block_size)

    async def models(self) -> Sequence[str]:
        return self._names

    async def ready(self) -> bool:
        """Asks for one token."""
        self._canaries += 1
        sampling = Sampling(max_tokens=1, temperature=0.0)
        canary = Generation(id=f"synthia-ready-{self._canaries}", prompt=[1], sampling=sampling)
        try:
            async with asyncio.timeout(_READY_DEADLINE_S):
                async for _ in self.generate(canary):
                    pass
        except (TimeoutError, RequestError):
            return False
        return True

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        headers = generation.on_attempt("")
        sampling = generation.sampling
        begun = False
        ending = None
        if (sampling.stop_token_ids or not sampling.skip_special_tokens) and self.tokenizer is not None:
            ending = _StopToken(self.tokenizer, generation)
        prompt: dict[str, Any] = {"prompt_token_ids": list(generation.prompt)}
        if sampling.structured_outputs is None:
            # What vLLM's renderer makes of token ids (`vllm/inputs/engine.py`, tokens_input). Without it vLLM looks at
            # the request in a thread of its own, which is slower, but a grammar takes it long.
            prompt["type"] = "token"
        if generation.salt:
            prompt["cache_salt"] = generation.salt
        if sampling.prompt_logprobs is not None:
            late_logprobs.install()
        with _errors_of_vllm(generation):
            outputs = self._outputs(generation, prompt, headers)
            async with aclosing(outputs):
                async for output in outputs:
                    (completion,) = output.outputs
                    finish = completion.finish_reason
                    if finish is not None and finish not in ("stop", "length"):
                        raise _unfinished(finish, generation, begun=begun)
                    try:
                        delta = await self._delta(output, generation, ending, first=not begun)
                    except BaseException:
                        generation.on_untaken(len(completion.token_ids))
                        raise
                    begun = True
                    yield delta

    async def _delta(self, output: Any, generation: Generation, ending: "_StopToken | None", *, first: bool) -> Delta:
        (completion,) = output.outputs
        delta = Delta(completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason)
        if ending is not None:
            ending.cut(delta)
        if completion.logprobs is not None:
            found = completion.logprobs
            long = len(found) > _LONG_DELTA
            told = await asyncio.to_thread(positions, found) if long else positions(found)
            delta.logprobs = [one or _UNKNOWN for one in told]
        if first:
            delta.cached = output.num_cached_tokens
            if output.prompt_logprobs is not None:
                told = await asyncio.to_thread(_prompt_positions, output.prompt_logprobs)
                delta.prompt_logprobs = told[: len(generation.prompt)]
        return delta

    async def _outputs(
        self, generation: Generation, prompt: dict[str, Any], headers: Mapping[str, str]
    ) -> AsyncGenerator[Any, None]:
        """What AsyncLLM.generate gives, read from its collector: of a sequence that is left, that still holds tokens.

        vLLM has counted them, its generator drops them, and nobody would pay for them.
        """
        collector = None
        try:
            collector = await self._llm.add_request(
                generation.id, prompt, sampling_params(generation.sampling), trace_headers=headers or None
            )
            finished = False
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            if collector is None:  # by the name that we gave it: it may be in the engine already
                await self._llm.abort(generation.id)
                raise
            try:
                await self._llm.abort(collector.request_id, internal=True)
            finally:
                generation.on_untaken(_tokens_in(collector))
            raise


def _tokens_in(collector: Any) -> int:
    """How many tokens wait in it; none where it holds an error."""
    try:
        output = collector.get_nowait()
    except Exception:
        return 0
    return sum(len(completion.token_ids) for completion in output.outputs) if output is not None else 0


@contextmanager
def _errors_of_vllm(generation: Generation) -> Iterator[None]:
    """Raises vLLM's errors as ours."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except answered() as error:
        if getattr(error, "http_status", None) == _UNAVAILABLE:
            raise Overloaded(str(error), 1.0) from None
        raise RequestError(str(error)) from None
    except refusals() as error:
        raise RequestError(_refusal(error), param=getattr(error, "parameter", None)) from None
    except EngineDeadError:
        raise UpstreamLost("the engine has died; the server is ending") from None
    except EngineGenerateError as error:
        if isinstance(error.__cause__, _NOT_REPRESENTABLE):
            raise RequestError(f"the engine can't take this request: {error.__cause__}") from None
        _log.exception("engine_failed", request=generation.id)
        raise UpstreamLost(f"the engine failed on this request: {error.__cause__ or error}") from None


def _refusal(error: Exception) -> str:
    """Its text; of a grammar, vLLM says that it is invalid, and leaves why to the error behind it."""
    told, cause = str(error).strip(), error.__cause__
    return f"{told} {cause}" if cause is not None and told.startswith("Invalid ") else told


class _StopToken:
    """Takes the text of a stop token off the end, where it has one.

    vLLM leaves it in together with stop strings (`include_stop_str_in_output`).
    """

    def __init__(self, tokenizer: Tokenizer, generation: Generation) -> None:
        self._tokenizer = tokenizer
        self._skip = generation.sampling.skip_special_tokens
        self._before = list(generation.prompt[-_CONTEXT_TOKENS:])

    def cut(self, delta: Delta) -> None:
        ids = list(delta.ids)
        if delta.finish == "stop" and not isinstance(delta.stop_reason, str) and ids:
            before = self._text([*self._before, *ids[:-1]][-_CONTEXT_TOKENS:])
            whole = self._text([*self._before, *ids[:-1]][-_CONTEXT_TOKENS:] + ids[-1:])
            delta.text = delta.text.removesuffix(whole[len(before) :])
        self._before = [*self._before, *ids][-_CONTEXT_TOKENS:]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def sampling_params(sampling: Sampling) -> Any:
    """vLLM's own parameters."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    given = {
        name: value
        for name in sampling.__struct_fields__
        if (value := getattr(sampling, name)) is not None and value != ()
    }
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids"):
        if name in given:
            given[name] = list(given[name])
    if sampling.structured_outputs is not None:
        given["structured_outputs"] = StructuredOutputsParams(**sampling.structured_outputs)
    # Not an object for each log-probability: a hundred thousand of them make every garbage collection a long one.
    given["flat_logprobs"] = any(name in given for name in ("logprobs", "prompt_logprobs", "logprob_token_ids"))
    return SamplingParams(
        **given, include_stop_str_in_output=True, output_kind=RequestOutputKind.DELTA, skip_clone=True
    )


def positions(found: Any) -> list[Position | None]:
    """vLLM's FlatLogprobs, place by place; None where it has none, as at a prompt's first token."""
    ids, texts, logprobs, ranks = found.token_ids, found.decoded_tokens, found.logprobs, found.ranks
    made: list[Position | None] = []
    for start, end in zip(found.start_indices, found.end_indices, strict=True):
        # The chosen token comes first, and once more among the likeliest; by its id it is one, as in vLLM's own dicts.
        each = {ids[at]: TokenLogprob(ids[at], texts[at] or "", logprobs[at], ranks[at]) for at in range(start, end)}
        top = list(each.values())
        made.append(Position(top[0], top) if top else None)
    return made


def _prompt_positions(found: Any) -> list[Position | None]:
    return positions(found.read() if isinstance(found, late_logprobs.LateLogprobs) else found)


def _unfinished(finish: str, generation: Generation, *, begun: bool) -> RequestError:
    """An end that is none: the engine gave a sequence up."""
    if generation.sampling.structured_outputs is not None:
        # With `allowed_token_ids` or `bad_words`, a grammar may be left without a token in the middle too.
        can = "go on" if begun else "generate"
        text = f"the engine can't {can} by this grammar or schema, with the request's other options"
        return RequestError(text, param="structured_outputs")
    if finish == "repetition":
        return RequestError("the engine ended a repetition")
    return UpstreamLost(f"the engine ended this request: {finish}")
