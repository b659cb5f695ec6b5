"""One class a chat API: how a request is put into the Synthia contract, and what of the reply's text is passed on."""

from synthia_vllm.gateway.dialects.anthropic import CountTokens, Messages
from synthia_vllm.gateway.dialects.base import Dialect, Exchange
from synthia_vllm.gateway.dialects.chat import ChatCompletions, Tokenize
from synthia_vllm.gateway.dialects.responses import Responses

DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": ChatCompletions,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
    "/v1/messages/count_tokens": CountTokens,
    "/tokenize": Tokenize,
}

__all__ = ["DIALECTS", "Dialect", "Exchange"]
