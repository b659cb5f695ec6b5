"""Replaying a reply: the processor over vLLM's own batch, and (e2e) a real engine that goes on where one stopped."""

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessors, validate_logits_processors_parameters
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from synthia_vllm.engine.arguments import CPU_WORKER, cpu_environment
from synthia_vllm.engine.demo import demo_model
from synthia_vllm.engine.replay import ARGUMENT, Replay

OPTION = "synthia_vllm.engine.replay:Replay"
VOCABULARY, ROWS, LENGTH = 16, 4, 32
CPU = torch.device("cpu")


def replay_processor() -> Replay:
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY))
    return Replay(config, CPU, False)


class Batch:
    """vLLM's batch, and what its runner does around a step."""

    def __init__(self) -> None:
        self.replay = replay_processor()
        self.states: dict[str, CachedRequestState] = {}
        self.rows = InputBatch(
            max_num_reqs=ROWS,
            max_model_len=LENGTH,
            max_num_batched_tokens=LENGTH,
            device=CPU,
            vocab_size=VOCABULARY,
            block_sizes=[16],
            kernel_block_sizes=[16],
            max_num_blocks_per_req=[2],
            logitsprocs=LogitsProcessors([self.replay]),
            logitsprocs_need_output_token_ids=True,
        )

    def start(self, name: str, ids: list[int] | None) -> None:
        self.states[name] = CachedRequestState(
            req_id=name,
            prompt_token_ids=[1, 2],
            mm_features=[],
            sampling_params=SamplingParams(extra_args={ARGUMENT: ids} if ids is not None else None),
            generator=None,
            block_ids=([0],),
            num_computed_tokens=0,
            output_token_ids=[],
        )
        self.rows.add_request(self.states[name])

    def step(self, *swap: int) -> dict[str, int]:
        """The tokens that each row gets where the model always wants the last one; two rows may change places first."""
        self.rows.condense()
        if swap:
            self.rows.swap_states(*swap)
        self.rows.refresh_metadata()
        logits = torch.zeros(self.rows.num_reqs, VOCABULARY)
        logits[:, -1] = 1.0
        chosen = self.replay.apply(logits).argmax(dim=-1).tolist()
        return dict(zip(self.rows.req_ids, chosen, strict=True))


def test_tokens_are_forced_in_order_and_then_let_go() -> None:
    batch = Batch()
    batch.start("a", [3, 0, 3])
    batch.start("b", None)
    for token in (3, 0, 3, 15, 15):
        assert batch.step() == {"a": token, "b": 15}
        for state in batch.states.values():
            state.output_token_ids.append(token)


def test_nothing_but_the_forced_token_is_possible() -> None:
    batch = Batch()
    batch.start("a", [3])
    batch.step()
    assert batch.replay.apply(torch.rand(1, VOCABULARY)).isfinite().nonzero().tolist() == [[0, 3]]


def test_logits_of_a_batch_without_replays_are_not_touched() -> None:
    batch = Batch()
    batch.start("a", None)
    batch.start("b", [])
    batch.step()
    logits = torch.rand(2, VOCABULARY)
    assert torch.equal(batch.replay.apply(logits.clone()), logits)


def test_a_prompt_that_takes_several_steps_is_waited_for() -> None:
    """Its row is there before it generates; what is drawn for it then is thrown away."""
    batch = Batch()
    batch.start("a", [3, 4])
    assert [batch.step()["a"] for _ in range(3)] == [3, 3, 3]


def test_ids_outside_the_vocabulary_are_not_replayed() -> None:
    batch = Batch()
    batch.start("a", [3, VOCABULARY])
    assert batch.step() == {"a": 15}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_rows_keep_their_replay_whatever_happens_to_the_batch(data: st.DataObject) -> None:
    """Sequences come, end, are preempted, come back and change places, several in one step."""
    batch, count = Batch(), 0
    waiting: list[str] = []  # preempted
    for _ in range(data.draw(st.integers(1, 12))):
        for name in list(batch.rows.req_ids):
            fate = data.draw(st.sampled_from(["stays", "stays", "stays", "ends", "is preempted"]))
            if fate != "stays":
                batch.rows.remove_request(name)
            if fate == "is preempted":
                waiting.append(name)
        for _ in range(data.draw(st.integers(0, ROWS - batch.rows.num_reqs))):
            if waiting and data.draw(st.booleans()):
                state = batch.states[waiting.pop()]
                state.output_token_ids = list(state.output_token_ids)  # as a scheduler that runs ahead gives it back
                batch.rows.add_request(state)
            else:
                count += 1
                batch.start(str(count), data.draw(st.none() | st.lists(st.integers(0, VOCABULARY - 2), max_size=5)))
        rows = range(batch.rows.num_reqs)
        swap = data.draw(st.permutations(rows))[:2] if len(rows) > 1 and data.draw(st.booleans()) else []
        for name, token in batch.step(*swap).items():
            state = batch.states[name]
            ids = (state.sampling_params.extra_args or {}).get(ARGUMENT) or []
            generated = len(state.output_token_ids)
            assert token == (ids[generated] if generated < len(ids) else VOCABULARY - 1)
            if data.draw(st.integers(0, 3)):  # else: its prompt was not through yet
                state.output_token_ids.append(data.draw(st.sampled_from([token, -1])))  # -1: not known here yet


@pytest.mark.parametrize("ids", ["1,2", [1.0], [True], [-1], [2**31], ["1"], [None], 7, {"1": 2}, [1, 2, 3, 4]])
def test_malformed_replays_are_refused(ids: Any) -> None:
    with pytest.raises(VLLMValidationError, match=ARGUMENT):
        validate_logits_processors_parameters([OPTION], SamplingParams(max_tokens=3, extra_args={ARGUMENT: ids}))


@pytest.mark.parametrize("arguments", [None, {}, {ARGUMENT: []}, {ARGUMENT: [0, 5, 5]}, {"other": "x"}])
def test_others_are_accepted(arguments: dict[str, Any] | None) -> None:
    validate_logits_processors_parameters([OPTION], SamplingParams(max_tokens=3, extra_args=arguments))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 20, "maxLength": 60}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "seed": {"temperature": 0.9, "seed": 7, "top_k": 50},
    "largest-seed": {"temperature": 1.0, "seed": 2**63 - 1},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.2, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "seed-penalties": {"temperature": 0.8, "seed": 3, "frequency_penalty": -0.7, "top_p": 0.9, "min_p": 0.02},
    "json": {"temperature": 0.0, "json": SCHEMA},
    "json-seed": {"temperature": 0.9, "seed": 5, "json": SCHEMA},
    "bias": {"temperature": 0.7, "seed": 11, "logit_bias": {260: 5.0}, "bad_words": ["the"], "min_tokens": 40},
    "allowed": {"temperature": 0.7, "seed": 12, "allowed_token_ids": [*range(100, 2000)], "ignore_eos": True},
}


class Engine:
    """vLLM in float32 with the processor, so small that more than a few long sequences at once preempt each other."""

    def __init__(self) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(demo_model()),
            dtype="float32",
            enforce_eager=True,
            worker_cls=CPU_WORKER,
            max_model_len=512,
            max_num_batched_tokens=64,
            block_size=32,
            num_gpu_blocks_override=32,
            kv_cache_memory_bytes=2**28,
            generation_config="vllm",
            logits_processors=[OPTION],
            disable_log_stats=False,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.llm.get_tokenizer().encode(text)
        return ids

    def generate(self, prompt: str, *many: dict[str, Any]) -> list[Any]:
        """One reply for each, all at once."""
        from vllm.sampling_params import StructuredOutputsParams

        params = []
        for one in many:
            named = {"max_tokens": 100} | one
            if schema := named.pop("json", None):
                named["structured_outputs"] = StructuredOutputsParams(json=schema)
            replay = named.pop("replay", None)
            params.append(SamplingParams(**named, extra_args=None if replay is None else {ARGUMENT: replay}))
        prompts: Any = [{"prompt_token_ids": self.encode(prompt)}] * len(many)
        return [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def preemptions(self) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    before = dict(os.environ)
    os.environ |= cpu_environment() | {"VLLM_NO_USAGE_STATS": "1"}
    try:
        engine = Engine()
        yield engine
        engine.llm.llm_engine.engine_core.shutdown()
    finally:
        os.environ.clear()
        os.environ |= before


PROMPT = "SYSTEM: You are helpful.\nUSER: Tell me about the moon.\nASSISTANT:"


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_reply_is_the_undisturbed_one(engine: Engine, kind: str) -> None:
    [whole] = engine.generate(PROMPT, KINDS[kind])
    ids = list(whole.token_ids)
    cuts = [1, len(ids) // 3, len(ids) // 2, len(ids) - 1]
    replayed = engine.generate(PROMPT, *[{**KINDS[kind], "replay": ids[:cut]} for cut in cuts])
    assert [list(reply.token_ids) for reply in replayed] == [ids] * len(cuts)
    assert {(reply.text, reply.finish_reason) for reply in replayed} == {(whole.text, whole.finish_reason)}
    if "json" in KINDS[kind]:
        assert json.loads(whole.text)


@pytest.mark.e2e
def test_the_cut_inside_a_json_string_goes_on_inside_it(engine: Engine) -> None:
    """With another's words so far, which this engine would not have chosen."""
    said = engine.encode('{"name": "Quartz zebras of')
    [reply] = engine.generate(PROMPT, {"temperature": 0.0, "json": SCHEMA, "replay": said})
    assert list(reply.token_ids)[: len(said)] == said
    assert json.loads(reply.text)["name"].startswith("Quartz zebras of")


@pytest.mark.e2e
@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 1.0},
        {"temperature": 0.0, "allowed_token_ids": [100, 101]},
        {"seed": 1, "logit_bias": {2404: -100.0}},
        {"temperature": 0.0, "bad_words": ["zebra"]},
        {"temperature": 0.01, "repetition_penalty": 2.0, "frequency_penalty": 2.0},
        {"min_tokens": 8, "ignore_eos": True},
    ],
)
def test_no_sampling_hinders_a_forced_token(engine: Engine, sampling: dict[str, Any]) -> None:
    said = engine.encode("zebra quartz zebra")
    if sampling.get("ignore_eos"):
        said = [engine.llm.get_tokenizer().eos_token_id, *said]
    [reply] = engine.generate(PROMPT, {"max_tokens": 12, "replay": said, **sampling})
    assert list(reply.token_ids)[: len(said)] == said


@pytest.mark.e2e
def test_preempted_and_chunked_replays_arrive_too(engine: Engine) -> None:
    """Prompts longer than a step, and more of them than the cache holds, beside others that don't replay."""
    prompt = PROMPT.replace("the moon", "the moon " * 60)
    kinds = [{"temperature": 0.9, "seed": seed, "ignore_eos": True, "max_tokens": 200} for seed in range(6)]
    whole = [list(engine.generate(prompt, kind)[0].token_ids) for kind in kinds]
    before = engine.preemptions()
    replays: list[dict[str, Any]] = [
        {**kind, "replay": ids[: 30 * number]} for number, (kind, ids) in enumerate(zip(kinds, whole, strict=True))
    ]
    assert [list(reply.token_ids) for reply in engine.generate(prompt, *replays)] == whole
    assert engine.preemptions() > before


@pytest.mark.e2e
def test_logprobs_of_replayed_tokens_are_those_of_the_first_time(engine: Engine) -> None:
    """vLLM takes them before any processor (`logprobs_mode` raw_logprobs)."""
    kind = {"temperature": 0.9, "seed": 2, "logprobs": 2, "max_tokens": 10}
    [whole] = engine.generate(PROMPT, kind)
    [again] = engine.generate(PROMPT, {**kind, "replay": list(whole.token_ids)[:6]})
    assert [{token: logprob.rank for token, logprob in one.items()} for one in again.logprobs] == [
        {token: logprob.rank for token, logprob in one.items()} for one in whole.logprobs
    ]
