"""The harness against a stand-in server: what it sends, what it makes of the answers, and how it goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.errors import SetupError
from synthia_vllm.eval import harness
from synthia_vllm.eval.benchmarks import NAMES, chosen
from synthia_vllm.eval.harness import cache_file, cached, database, evaluate
from synthia_vllm.eval.model import Completions, adds_bos
from synthia_vllm.eval.scores import Evaluation
from synthia_vllm.prompt import render
from tests.eval.conftest import DATA, StandIn

FEW = ("hellaswag", "truthfulqa_mc2")


def run(stand_in: StandIn, cache: Path, *names: str, **options: Any) -> tuple[Evaluation, dict[str, Any]]:
    given: dict[str, Any] = {"format": "plain", "concurrency": 4, "limit": None, "data": DATA, **options}
    return evaluate(stand_in.endpoint, chosen(names or FEW), cache=cache, **given)


def test_the_whole_table_comes_from_local_data(stand_in: StandIn, all_data: Path, tmp_path: Path) -> None:
    found, _ = run(stand_in, tmp_path / "cache", *NAMES, data=all_data, limit=1)
    assert [(score.task, score.shots) for score in found.scores] == [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc", 0),
    ]
    assert {score.task: score.questions for score in found.scores} == {
        "arc_challenge": 1,
        "hellaswag": 1,
        "mmlu": 57,
        "truthfulqa_mc": 1,
    }
    assert found.average == pytest.approx(sum(score.value for score in found.scores) / 4)


def test_prompts_are_token_ids_with_one_bos_and_a_token_is_asked_for(stand_in: StandIn, tmp_path: Path) -> None:
    run(stand_in, tmp_path / "cache", "truthfulqa_mc2", limit=1)
    assert all(prompt[0] == 0 and 0 not in prompt[1:] for prompt in stand_in.prompts)
    body = stand_in.bodies[0]
    assert (body["echo"], body["max_tokens"], body["logprobs"], body["temperature"]) == (True, 1, 1, 0)
    assert "stop" not in body


def test_a_chat_prompt_is_in_the_synthia_format_and_the_answer_follows_a_blank(
    stand_in: StandIn, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    run(stand_in, tmp_path / "cache", "hellaswag", format="chat", limit=1)
    text = AutoTokenizer.from_pretrained(stand_in.tokenizer).decode(stand_in.prompts[0], skip_special_tokens=True)
    question = json.loads((DATA / "hellaswag/data/validation.jsonl").read_text().splitlines()[0])
    assert text.startswith("USER: ")
    assert text.count("\nASSISTANT: ") == 11  # ten examples and the question
    asked = f"{question['activity_label']}: {question['ctx_a']} {question['ctx_b'].capitalize()}"
    head, _, answer = text.rpartition("\nASSISTANT: ")
    assert head.endswith(render([{"role": "user", "content": asked}], add_generation_prompt=False))
    assert answer in question["endings"]


def test_interrupted_and_resumed_equals_uninterrupted(stand_in: StandIn, tmp_path: Path) -> None:
    whole, _ = run(stand_in, tmp_path / "whole")
    asked = len(stand_in.prompts)
    stand_in.prompts.clear()
    stand_in.interrupt_at = asked // 2
    with pytest.raises(KeyboardInterrupt):
        run(stand_in, tmp_path / "cut")
    kept = cached(tmp_path / "cut")
    assert 0 < kept < asked
    stand_in.interrupt_at = None
    stand_in.prompts.clear()
    resumed, _ = run(stand_in, tmp_path / "cut")
    assert len(stand_in.prompts) == asked - kept
    assert resumed.answered_before == kept
    assert resumed.scores == whole.scores


def test_a_refusal_is_an_error_that_says_where_to_look(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthia_vllm.eval.model._RETRIES", 1)
    stand_in.status = 400
    with pytest.raises(SetupError, match="refused a request \\(400") as refused:
        run(stand_in, tmp_path / "cache", "truthfulqa_mc2", limit=1)
    assert "cache.log" in str(refused.value)
    assert "not today" in (tmp_path / "cache.log").read_text()


def test_answers_of_another_model_server_or_format_are_not_used(stand_in: StandIn, tmp_path: Path) -> None:
    files = {
        cache_file(tmp_path, stand_in.endpoint, asked, words, format)
        for asked in ("http://a", "")
        for words in ([], ["--engine.dtype", "float32"])
        for format in ("plain", "chat")
    }
    assert len(files) == 8
    assert all(cached(file) == 0 and not database(file).exists() for file in files)


@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_are_the_tokenizers_own_business(byte_tokenizer: Callable[[bool], Path], bos: bool) -> None:
    assert adds_bos(str(byte_tokenizer(bos))) is bos


def test_token_ids_are_those_of_the_harness_hf_backend(stand_in: StandIn) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes))
    tokenizer = AutoTokenizer.from_pretrained(stand_in.tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    ours = Completions(stand_in.endpoint, concurrency=2)
    for context, answer in (("Question: why?\nAnswer:", " because"), ("Q: why? A: ", "so")):
        assert ours._encode_pair(context, answer) == theirs._encode_pair(context, answer)


def test_without_the_harness_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise harness.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(harness.importlib.metadata, "version", missing)
    with pytest.raises(SetupError, match="pip install 'lm-eval"):
        harness.require_harness()
