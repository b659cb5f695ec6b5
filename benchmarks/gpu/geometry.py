"""A model of Synthia's sizes with random weights: as much work a token as the real one, and no download.

The weights are written to disk, not left to `--load-format dummy`: the card's script has no such option, and a start
that reads no weights would be no start. Where only options of vLLM are compared (`tune`) they are dummies.
"""

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Source: FACTS of the design, from config.json of copies of SOLAR-10.7B.
SYNTHIA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 48,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
# For a look at the kit itself, also without a GPU.
TINY: Mapping[str, Any] = {
    **SYNTHIA,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GEOMETRIES: Mapping[str, Mapping[str, Any]] = {"synthia": SYNTHIA, "tiny": TINY}
_SPREAD = 0.02  # as Llama models are initialized
_INDEX = "model.safetensors.index.json"


def make_model(geometry: Mapping[str, Any], folder: Path) -> Path:
    """The model in this folder, written now unless it is there. One file a layer; the index comes last."""
    config = folder / "config.json"
    if (folder / _INDEX).exists() and json.loads(config.read_text()) == dict(geometry):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    config.write_text(json.dumps(dict(geometry), indent=1))
    write_tokenizer(folder)
    write_weights(geometry, folder)
    return folder


def tensors(geometry: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, as `LlamaForCausalLM` saves them: outside of the layers first, then layer by layer."""
    hidden, inner = geometry["hidden_size"], geometry["intermediate_size"]
    head = hidden // geometry["num_attention_heads"]
    keys = head * geometry["num_key_value_heads"]
    embedding = (geometry["vocab_size"], hidden)
    yield {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": (hidden,)}
    for number in range(geometry["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }


def write_weights(geometry: Mapping[str, Any], folder: Path) -> None:
    """Random matrices in bfloat16, norms of one; made on the GPU where there is one."""
    import torch
    from safetensors.torch import save_file

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(1)
    parts = list(tensors(geometry))
    where: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(
            {name: _values(shape, source, device) for name, shape in part.items()}, folder / file, {"format": "pt"}
        )
        where |= dict.fromkeys(part, file)
    total = sum((folder / file).stat().st_size for file in set(where.values()))
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def _values(shape: tuple[int, ...], source: "torch.Generator", device: "torch.device") -> "torch.Tensor":
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return made.normal_(0.0, _SPREAD, generator=source).cpu()


def write_tokenizer(folder: Path) -> None:
    """The 32000-entry SentencePiece tokenizer that comes with mistral_common, of Llama's family as Synthia's is."""
    package = importlib.util.find_spec("mistral_common")
    assert package is not None
    assert package.origin is not None
    shutil.copy(Path(package.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
