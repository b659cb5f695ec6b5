"""How the prompt's first word meets the tokenizer."""

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from synthia_vllm.gateway.demand import estimate_tokens

_PROBE = "SYSTEM: a"


def bos_lead(tokenizer: Any) -> str:
    """What must stand between BOS and the prompt so that a template gives the ids of the card's `tokenizer.encode`.

    `encode` lets SentencePiece tokenizers put their dummy blank before the first word. Where BOS is written as text,
    as vLLM's chat path needs it, some (Metaspace with `prepend_scheme: first`) take BOS for the first word and leave
    the blank out: every prompt would begin with a token that the model was not trained on.
    """
    bos = tokenizer.bos_token
    if not bos:
        return ""
    wanted = [tokenizer.bos_token_id, *tokenizer.encode(_PROBE, add_special_tokens=False)]
    fits = (lead for lead in ("", " ") if tokenizer.encode(bos + lead + _PROBE, add_special_tokens=False) == wanted)
    return next(fits, "")


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """Counts the tokens of a text, with a copy of a fast tokenizer: vLLM's own threads use the original.

    A slow tokenizer has no Rust half to copy; then the gateway's estimate has to do.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return estimate_tokens
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    return lambda text: len(copy.encode(text, add_special_tokens=False).ids)
