"""The server as the harness sees it: log-likelihoods of token ids through `/v1/completions`."""

from typing import Any, Literal

from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoTokenizer

from synthia_vllm.eval.server import Endpoint
from synthia_vllm.prompt import render

Format = Literal["plain", "chat"]
# More than the harness's 3: a server that is busy, or a key's limit, asks to come back later.
_RETRIES = 8
_TIMEOUT_S = 1800


class Completions(LocalCompletionsAPI):  # type: ignore[misc]
    """The harness's `local-completions`, with token ids as its `hf` backend makes them.

    Special tokens are the tokenizer's own business there, and so here. In the format `chat` a prompt is what the card's
    format makes of the messages, again as token ids: the server's chat route has no log-likelihoods of a prompt.

    `concurrency` is at least 2: with 1 the harness takes another client, with other errors.
    """

    def __init__(self, endpoint: Endpoint, *, concurrency: int) -> None:
        super().__init__(
            base_url=f"{endpoint.url}/v1/completions",
            model=endpoint.model,
            tokenizer=endpoint.tokenizer,
            tokenizer_backend="huggingface",
            num_concurrent=concurrency,
            max_length=endpoint.max_length,
            max_retries=_RETRIES,
            timeout=_TIMEOUT_S,
            header={"Authorization": f"Bearer {endpoint.key}"},
            add_bos_token=adds_bos(endpoint.tokenizer),
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The card's format without BOS, which the tokenizer adds.

        The harness puts nothing between this and an answer; the blank goes to the answer when both become tokens.
        """
        return render(chat_history, add_generation_prompt=add_generation_prompt) + " "

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness notes of it."""
        return "synthia, style card"

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)


def adds_bos(tokenizer: str) -> bool:
    """Whether it begins every text with a special token, as Llama's do."""
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    return bool(loaded("a").input_ids != loaded("a", add_special_tokens=False).input_ids)
