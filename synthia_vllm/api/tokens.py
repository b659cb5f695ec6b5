"""POST /tokenize and /detokenize, in vLLM's form: answered from the gateway's own tokenizer."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from synthia_vllm.api.base import Model, decode
from synthia_vllm.api.conversation import Messages, check_continued, conversation, refuse_tools, rendered
from synthia_vllm.api.errors import ErrorForm, openai_form
from synthia_vllm.api.sampling import Name, TokenId, check_token_ids
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import RequestError

# What a tokenizer does in one call keeps everybody else waiting.
MAX_TOKENIZED = 2**20  # characters
MAX_DETOKENIZED = 2**17  # ids


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A text, or a conversation that is put into the prompt format first."""

    model: Name | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZED)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # of a text; true where not given
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: Any = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]
    model: Name | None = None


class Tokenize:
    """Tells the ids that a completion's text, or a conversation, would go to the engine with."""

    path = "/tokenize"
    body: type[msgspec.Struct] = TokenizeRequest
    form: ErrorForm = staticmethod(openai_form)

    def decode(self, body: bytes) -> TokenizeRequest:
        return decode(body, TokenizeRequest)

    def answer(self, request: TokenizeRequest, model: Model) -> bytes:
        tokenizer = _tokenizer(model)
        ids = list(self._ids(request, model, tokenizer))
        names = [tokenizer.backend.id_to_token(token) for token in ids] if request.return_token_strs else None
        told = {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": names}
        return msgspec.json.encode(told)

    def _ids(self, request: TokenizeRequest, model: Model, tokenizer: Tokenizer) -> Any:
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("send either prompt, a text, or messages", param="prompt")
        if request.messages is not None:
            refuse_tools(request.tools, None)
            check_continued(request.messages, request.continue_final_message, request.add_generation_prompt)
            messages = conversation(request.messages, model_name=request.model or "", model=model)
            return rendered(messages, model, continue_final_message=bool(request.continue_final_message)).ids
        assert request.prompt is not None
        if request.add_special_tokens is False:
            return tokenizer.encode(request.prompt)
        return tokenizer.encode_with_bos(request.prompt)


class Detokenize:
    """Tells the text of token ids, special tokens included."""

    path = "/detokenize"
    body: type[msgspec.Struct] = DetokenizeRequest
    form: ErrorForm = staticmethod(openai_form)

    def decode(self, body: bytes) -> DetokenizeRequest:
        return decode(body, DetokenizeRequest)

    def answer(self, request: DetokenizeRequest, model: Model) -> bytes:
        tokenizer = _tokenizer(model)
        check_token_ids(request.tokens, model, "tokens")
        return msgspec.json.encode({"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)})


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise RequestError("this gateway has no tokenizer; its operator can give it one with --tokenizer")
    return model.tokenizer
