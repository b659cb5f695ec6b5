import json
from typing import Any

import pytest

from synthia_vllm.api.base import AnsweringApi, Model
from synthia_vllm.api.tokens import Detokenize, Tokenize
from synthia_vllm.errors import RequestError
from tests.api.byte_tokenizer import BOS_ID, byte_tokenizer
from tests.api.openai_replies import MODEL, UNKNOWN

TOKENIZER = byte_tokenizer()


def answered(api: AnsweringApi, body: dict[str, Any], model: Model = MODEL) -> Any:
    return json.loads(api.answer(api.decode(json.dumps(body).encode()), model))


def test_a_text_is_tokenized_as_a_completion_is() -> None:
    ids = [BOS_ID, *TOKENIZER.encode("ab")]
    told = answered(Tokenize(), {"prompt": "ab"})
    assert told == {"count": 3, "max_model_len": 4096, "tokens": ids, "token_strs": None}
    assert answered(Tokenize(), {"prompt": "ab", "add_special_tokens": False})["tokens"] == ids[1:]
    assert answered(Tokenize(), {"prompt": "ab", "return_token_strs": True})["token_strs"] == ["<s>", "a", "b"]


def test_a_conversation_is_tokenized_as_a_chat_is() -> None:
    told = answered(Tokenize(), {"model": "synthia", "messages": [{"role": "user", "content": "a"}]})
    assert told["tokens"] == [BOS_ID, *TOKENIZER.encode("USER: a\nASSISTANT:")]


def test_ids_become_text_again() -> None:
    assert answered(Detokenize(), {"tokens": [BOS_ID, *TOKENIZER.encode("ab🐋")]}) == {"prompt": "<s>ab🐋"}


@pytest.mark.parametrize(
    ("api", "body", "param"),
    [
        (Tokenize(), {"prompt": 5}, "prompt"),
        (Tokenize(), {}, "prompt"),
        (Tokenize(), {"prompt": "a", "messages": [{"role": "user"}]}, "prompt"),
        (Tokenize(), {"messages": []}, "messages"),
        (Tokenize(), {"messages": [{"role": "user"}], "continue_final_message": True}, "continue_final_message"),
        (Tokenize(), {"messages": [{"role": "user"}], "tools": [{}]}, "tools"),
        (Detokenize(), {"tokens": "x"}, "tokens"),
        (Detokenize(), {}, "tokens"),
        (Detokenize(), {"tokens": [257]}, "tokens"),
        (Detokenize(), {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_a_bad_request_names_its_field(api: AnsweringApi, body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        answered(api, body)
    assert refused.value.param == param


def test_without_a_tokenizer_the_cure_is_told() -> None:
    with pytest.raises(RequestError, match="--tokenizer"):
        answered(Tokenize(), {"prompt": "a"}, UNKNOWN)
