"""vLLM's log-probabilities of prompts: late, and the same."""

from typing import Any

import pytest
import torch
from vllm.logprobs import create_prompt_logprobs
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from synthia_vllm.engine.demo import demo_model
from synthia_vllm.engine.late_logprobs import LateLogprobs, install


@pytest.fixture(scope="module")
def tensors() -> list[LogprobsTensors]:
    """Of 40 tokens with 3 each, as they would come of a prompt in two parts."""
    seed = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (40, 4), generator=seed)
    ids[:, 2] = ids[:, 0]  # the chosen token is among the likeliest
    logprobs, ranks = torch.log(torch.rand(ids.shape, generator=seed)), torch.full((40,), 2)
    return [LogprobsTensors(ids[part], logprobs[part], ranks[part]) for part in (slice(25), slice(25, 40))]


def processor(tensors: list[LogprobsTensors], *, flat: bool) -> Any:
    tokenizer = get_tokenizer(str(demo_model()))
    made = LogprobsProcessor(tokenizer, None, create_prompt_logprobs(flat), None, None, 3)
    for each in tensors:
        made._update_prompt_logprobs(each)
    return made


def test_what_is_read_late_is_what_vllm_makes_at_once(tensors: list[LogprobsTensors]) -> None:
    made = processor(tensors, flat=False).pop_prompt_logprobs()
    install()
    late = processor(tensors, flat=True).pop_prompt_logprobs()
    assert isinstance(late, LateLogprobs)
    assert list(late.read())[1:] == made[1:]


def test_it_is_told_once(tensors: list[LogprobsTensors]) -> None:
    install()
    made = processor(tensors, flat=True)
    assert made.pop_prompt_logprobs()
    assert not made.pop_prompt_logprobs()


def test_requests_of_vllms_own_routes_stay_as_they_are(tensors: list[LogprobsTensors]) -> None:
    install()
    install()
    made = processor(tensors, flat=False).pop_prompt_logprobs()
    assert made[0] is None
    assert [len(entry) for entry in made[1:]] == [3] * 40
