"""The null engine's tokenizer: a real one, a tenth of a second to load, for whoever speaks token ids to a null engine.

    python -m synthia_vllm.bench.null.engine --tokenizer-folder DIR
    synthia-vllm gateway --tokenizer DIR --upstream http://127.0.0.1:8001

Prompts become bytes (a byte-level BPE without merges), whatever is in them; the words of `null_tokens` are one token
each, but no text encodes to them: in a prompt, they are always an earlier engine's.
"""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from synthia_vllm.bench.null.tokens import (
    BOS,
    EOS,
    FIRST_OF_BYTES,
    FIRST_OF_OTHERS,
    FIRST_OF_REPLIES,
    SPECIAL,
    UNK,
    WORDS,
    other_text,
)
from synthia_vllm.engine.tokenizer import Tokenizer


@cache
def null_tokenizer() -> Tokenizer:
    """It, as the gateway uses it."""
    return Tokenizer(backend(), bos=SPECIAL[BOS])


def write(folder: Path) -> Path:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a folder, which is made; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "unk_token": SPECIAL[UNK],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def backend() -> tokenizers.Tokenizer:
    letters = _letters()
    vocabulary = {text: number for number, text in enumerate(SPECIAL)}
    vocabulary |= {letter: FIRST_OF_BYTES + byte for byte, letter in enumerate(letters)}
    vocabulary |= {other_text(token): token for token in range(FIRST_OF_OTHERS, FIRST_OF_REPLIES)}
    blank = letters[ord(" ")]
    vocabulary |= {word.replace(" ", blank): FIRST_OF_REPLIES + number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    bos = SPECIAL[BOS]
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return made


def _letters() -> list[str]:
    """How byte-level tokenizers (GPT-2's) write each byte: printable ones as they are, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
