"""What the harness sends, through the whole stack to the real engine."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from synthia_vllm.engine.demo import demo_model
from synthia_vllm.eval.benchmarks import chosen
from synthia_vllm.eval.harness import evaluate
from synthia_vllm.eval.server import find_endpoint
from tests.conftest import RunningServer

pytestmark = pytest.mark.e2e

DATA = Path(__file__).parents[1] / "eval" / "data"


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids with the contract's stop strings inside."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    texts = ("USER: Which is larger?\nUSER: the Sun", "SYSTEM: Orcas are\nSYSTEM: whales")
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def complete(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    given = {"model": "synthia", "temperature": 0, "seed": 1234, "echo": True, "logprobs": 1, **body}
    response = client.post("/v1/completions", json=given)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return sorted(choices, key=lambda choice: int(choice["index"]))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_batch_of_prompts_is_echoed_with_log_probabilities(
    client: httpx.Client, prompts: list[list[int]], max_tokens: int
) -> None:
    choices = complete(client, prompt=prompts, max_tokens=max_tokens)
    assert len(choices) == len(prompts)
    for choice, ids in zip(choices, prompts, strict=True):
        told = choice["logprobs"]["token_logprobs"]
        assert len(told) == len(ids) + max_tokens
        assert told[0] is None
        assert all(value <= 0 for value in told[1:])


def test_no_template_touches_a_completion(client: httpx.Client, prompts: list[list[int]]) -> None:
    (choice,) = complete(client, prompt=prompts[:1], max_tokens=1, return_token_ids=True)
    assert choice["prompt_token_ids"] == prompts[0]


def test_no_default_stop_ends_a_completion(client: httpx.Client) -> None:
    body = {"model": "synthia", "prompt": "USER: one\n" * 12, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert "USER:" in choice["text"]


def test_a_prompt_alone_and_in_a_batch_has_the_same_log_probabilities(
    client: httpx.Client, prompts: list[list[int]]
) -> None:
    together = complete(client, prompt=prompts, max_tokens=1)
    for choice, ids in zip(together, prompts, strict=True):
        (alone,) = complete(client, prompt=[ids], max_tokens=1)
        told = [pair["logprobs"]["token_logprobs"][1:-1] for pair in (choice, alone)]
        assert sum(told[0]) == pytest.approx(sum(told[1]), rel=0.02)  # bfloat16


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_the_harness_scores_the_server(server: RunningServer, tmp_path: Path, format: Any) -> None:
    endpoint = find_endpoint(server.url, model=None, tokenizer=None, key="none")
    found, _ = evaluate(
        endpoint,
        chosen(["truthfulqa_mc2"]),
        format=format,
        concurrency=8,
        limit=2,
        data=DATA,
        cache=tmp_path / "cache",
    )
    (score,) = found.scores
    assert score.questions == 2
    assert 0 < score.value < 1
