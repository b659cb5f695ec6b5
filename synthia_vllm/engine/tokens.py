"""How the prompt's first word meets the tokenizer."""

from typing import Any

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
