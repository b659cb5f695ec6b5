"""vLLM's objects as the port's."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.engine.grammar import refusal_of_engine
from synthia_vllm.engine.local import LocalEngine, positions, sampling_params
from synthia_vllm.engine.port import Delta, Generation, Position, Sampling, TokenLogprob
from synthia_vllm.errors import RequestError


class Saying:
    """An AsyncLLM that says these outputs."""

    model_config = SimpleNamespace(model="null", max_model_len=100_000)

    def __init__(self, *said: Any) -> None:
        self.said = said

    async def add_request(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        said = iter(self.said)
        return SimpleNamespace(get_nowait=lambda: next(said))


def flat(count: int, begun: int = 0) -> FlatLogprobs:
    made = FlatLogprobs()
    for at in range(begun, begun + count):
        made.append({at + 5: Logprob(-0.5 * at, 2, f"a{at}"), 7: Logprob(-0.25, 1, None)})
    return made


def output(logprobs: FlatLogprobs | None, finish: str | None = None, *, prompt: FlatLogprobs | None = None) -> Any:
    ids = [5] * (len(logprobs) if logprobs else 1)
    one = SimpleNamespace(token_ids=ids, text="a", finish_reason=finish, stop_reason=None, logprobs=logprobs)
    return SimpleNamespace(outputs=[one], num_cached_tokens=0, prompt_logprobs=prompt, finished=finish is not None)


async def deltas(*said: Any, **sampling: Any) -> list[Delta]:
    engine = LocalEngine(Saying(*said), null_tokenizer(), ["null"])
    generation = Generation(id="1", prompt=[1, 2, 3], sampling=Sampling(max_tokens=9, **sampling))
    return [delta async for delta in engine.generate(generation)]


def test_the_chosen_token_is_the_first_and_only_once() -> None:
    made = FlatLogprobs()
    made.append_fast([5, 6, 5], [-1.0, -0.5, -1.0], iter([2, 1, 2]), ["b", "a", "b"])
    chosen = TokenLogprob(5, "b", -1.0, 2)
    assert positions(made) == [Position(chosen, [chosen, TokenLogprob(6, "a", -0.5, 1)])]


async def test_each_token_has_its_own_however_many_come_together() -> None:
    one, other = await deltas(output(flat(1)), output(flat(999, begun=1), "stop"), logprobs=1)
    assert len(one.ids) == len(one.logprobs or ()) == 1
    assert [position.chosen.id for position in other.logprobs or ()] == list(range(6, 1005))


async def test_the_first_token_of_a_prompt_has_none() -> None:
    prompt = FlatLogprobs()
    prompt.append(None)
    prompt.extend(flat(2))
    first, second = await deltas(output(None, prompt=prompt), output(None, "stop"), prompt_logprobs=1)
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [position and position.chosen.text for position in first.prompt_logprobs[1:]] == ["a0", "a1"]
    assert second.prompt_logprobs is None


@pytest.mark.parametrize("field", [{"logprobs": 0}, {"prompt_logprobs": 0}, {"logprob_token_ids": (5,)}])
def test_log_probabilities_are_asked_for_in_the_form_that_is_read(field: dict[str, Any]) -> None:
    assert sampling_params(Sampling(max_tokens=1, **field)).flat_logprobs
    assert not sampling_params(Sampling(max_tokens=1)).flat_logprobs


class Validating(Saying):
    """One that looks at a grammar as vLLM's does."""

    async def add_request(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

        validate_xgrammar_grammar(params)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"grammar": 'root ::= "a'}, "Invalid grammar specification.* string literal"),
        ({"regex": "(a"}, "parenthesis is not closed"),
        ({"json": {"type": "foo"}}, 'type "foo"'),
        ({"structural_tag": '{"type": "x"}'}, "Invalid structural tag specification.* type must be"),
    ],
)
async def test_why_vllm_refuses_a_grammar_is_told(wanted: dict[str, Any], why: str) -> None:
    engine = LocalEngine(Validating(), null_tokenizer(), ["null"])
    asked = Generation(id="1", prompt=[1], sampling=Sampling(max_tokens=9, structured_outputs=wanted))
    with pytest.raises(RequestError, match=why) as refused:
        await anext(engine.generate(asked))
    assert "cpp" not in refusal_of_engine(refused.value, "response_format").message


class Collecting(Saying):
    """An AsyncLLM with vLLM's own collector, that puts a last, empty output there when it is told to abort."""

    def __init__(self) -> None:
        super().__init__()
        self.collector = RequestOutputCollector(RequestOutputKind.DELTA, "1-internal")
        self.aborted: list[tuple[str, bool]] = []

    async def add_request(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        return self.collector

    async def abort(self, request_id: str, internal: bool = False) -> None:
        self.aborted.append((request_id, internal))
        self.put([], "abort")

    def put(self, ids: list[int], finish: str | None = None, logprobs: FlatLogprobs | None = None) -> None:
        one = CompletionOutput(0, "", ids, None, logprobs, finish_reason=finish)
        self.collector.put(RequestOutput("1", None, [1], None, [one], finish is not None))


async def left_while(llm: Collecting, *, waits_for_engine: bool, **sampling: Any) -> tuple[list[int], int]:
    """Leaves a sequence after one delta; the ids that were taken, and how many were told as not taken."""
    untaken: list[int] = []
    generation = Generation(id="1", prompt=[1], sampling=Sampling(max_tokens=9, **sampling), on_untaken=untaken.append)
    deltas = LocalEngine(llm, null_tokenizer(), ["null"]).generate(generation)
    llm.put([5])
    taken = list((await anext(deltas)).ids)
    if waits_for_engine:
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        llm.put([6, 7])
        waiting.cancel()
        await asyncio.wait([waiting])
    else:
        llm.put([6, 7])
        await deltas.aclose()
    return taken, sum(untaken)


@pytest.mark.parametrize("waits_for_engine", [True, False])
async def test_tokens_that_wait_when_a_sequence_is_left_are_told(waits_for_engine: bool) -> None:
    llm = Collecting()
    assert await left_while(llm, waits_for_engine=waits_for_engine) == ([5], 2)
    assert llm.aborted == [("1-internal", True)]


async def test_tokens_whose_log_probabilities_are_being_read_when_a_sequence_is_left_are_told() -> None:
    llm, untaken = Collecting(), []
    generation = Generation(
        id="1", prompt=[1], sampling=Sampling(max_tokens=999, logprobs=0), on_untaken=untaken.append
    )
    reading = asyncio.ensure_future(anext(LocalEngine(llm, null_tokenizer(), ["null"]).generate(generation)))
    llm.put([5] * 999, logprobs=flat(999))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert (sum(untaken), llm.aborted) == (999, [("1-internal", True)])


class Refusing(Collecting):
    """One that never gets to hand out its collector."""

    async def add_request(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        await asyncio.Event().wait()


async def test_a_sequence_that_is_left_while_vllm_takes_it_is_aborted_by_its_name() -> None:
    llm = Refusing()
    generation = Generation(id="1", prompt=[1], sampling=Sampling(max_tokens=9))
    asking = asyncio.ensure_future(anext(LocalEngine(llm, null_tokenizer(), ["null"]).generate(generation)))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    assert llm.aborted == [("1", False)]
