"""The token ids that a rendered prompt becomes, with a byte-level BPE and a SentencePiece tokenizer."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.engine.demo import demo_model
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.prompt import render, template_path
from tests.prompt.test_format import conversation


@pytest.fixture(scope="session")
def byte_level() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The 32,000-entry Llama-family tokenizer that mistral_common ships, as a Hugging Face one."""
    from transformers import LlamaTokenizer

    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    model = files("mistral_common").joinpath("data", "tokenizer.model.v1").read_bytes()
    (folder / "tokenizer.model").write_bytes(model)
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


@pytest.mark.parametrize("tokenizer_name", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("style", ["card", "script"])
@pytest.mark.parametrize("turns", [1, 2, 5, 20])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_are_the_cards_with_bos_once(
    tokenizer_name: str, style: Any, turns: int, system: str | None, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(tokenizer_name)
    messages, _, _ = conversation(turns, system)
    options = {"chat_template": template_path(style).read_text(), "bos_lead": Tokenizer.of(tokenizer).lead}
    sent = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    lead = "" if style == "script" and system is None else options["bos_lead"]  # the script's text has its own blank
    assert text == render(messages, style=style, bos_token=tokenizer.bos_token + lead)
    # The card: `tokenizer.encode(instruction)`, which puts the tokenizer's own BOS in front where it has one.
    body = tokenizer.encode(render(messages, style=style), add_special_tokens=False)
    assert list(sent) == [tokenizer.bos_token_id, *body]
    assert list(sent).count(tokenizer.bos_token_id) == 1
    if tokenizer_name == "sentencepiece":
        assert list(sent) == tokenizer.encode(render(messages, style=style))
