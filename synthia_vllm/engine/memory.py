"""Does the model fit: bytes of its weights and of one token's KV cache."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synthia_vllm.engine.hardware import GIB, Machine
from synthia_vllm.errors import SetupError

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
# What vLLM and torch take beside weights and KV cache: two processes with torch, activations of one batch.
OVERHEAD_BYTES = 2 * GIB
# vLLM's `--max-num-seqs` default on a CPU: more KV cache than this many full contexts is never used.
MAX_SEQUENCES = 256
_DEMO_BYTES = 2 * GIB


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide about memory. Source: the model's config.json."""

    context: int  # tokens
    heads: int
    kv_bytes_per_token: int
    weight_bytes: int | None  # None: not known before the weights are fetched


def read_geometry(model: str, dtype: str = "auto") -> Geometry | None:
    """Geometry of a folder or a hub id; None for a hub id that can't be reached (vLLM will say why).

    Raises SetupError for a folder that holds no Llama-architecture model.
    """
    folder = Path(model)
    if folder.is_dir():
        config_file = folder / "config.json"
        if not config_file.exists():
            raise SetupError(f"--model {model}: the folder has no config.json, so it is no model")
        weights = sum(file.stat().st_size for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
        if not weights:
            raise SetupError(f"--model {model}: the folder has no weights ({', '.join(_WEIGHT_FILES)})")
        return _geometry(model, json.loads(config_file.read_text()), weights, dtype)
    if model.startswith(("/", ".", "~")):
        raise SetupError(f"--model {model}: there is no such folder")
    return _hub_geometry(model, dtype)


def in_float32(geometry: Geometry) -> Geometry:
    """The same model, which was in 16-bit numbers."""
    weights = geometry.weight_bytes and 2 * geometry.weight_bytes
    return replace(geometry, kv_bytes_per_token=2 * geometry.kv_bytes_per_token, weight_bytes=weights)


def read_config(model: str) -> dict[str, Any] | None:
    """A model's config.json, of a folder or of a hub id that `read_geometry` found; None where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = Path(model, "config.json") if Path(model).is_dir() else try_to_load_from_cache(model, "config.json")
        config = json.loads(Path(file).read_text()) if isinstance(file, str | Path) else None
    except (OSError, ValueError, HFValidationError):
        return None
    return config if isinstance(config, dict) else None


def choose_kv_bytes(
    geometry: Geometry, context: int, machine: Machine, wanted_gib: float | None, *, demo: bool = False
) -> int:
    """KV cache for a CPU in bytes: what was asked for, else half of what is free beside the weights.

    For the demo model 2 GiB, eleven of its contexts: vLLM writes every byte of it at the start, a gigabyte a second.
    Raises SetupError where the weights and one context do not fit, and says what would.
    """
    weights = geometry.weight_bytes or 0
    one_context = context * geometry.kv_bytes_per_token
    free = machine.memory_available - weights - OVERHEAD_BYTES
    if free < one_context:
        fits = free // geometry.kv_bytes_per_token // 128 * 128
        cure = (
            f"--engine.max-model-len {fits} would fit"
            if fits >= 512
            else "use a smaller or quantized model, or a machine with more memory"
        )
        raise SetupError(
            f"the model does not fit: weights {_gib(weights)}, KV cache of one context of {context} tokens "
            f"{_gib(one_context)} and {_gib(OVERHEAD_BYTES)} for the engine, but {_gib(machine.memory_available)} of "
            f"memory are free; {cure}"
        )
    if wanted_gib is None:
        most = _DEMO_BYTES if demo else MAX_SEQUENCES * one_context
        return max(one_context, min(free // 2, most))
    wanted = int(wanted_gib * GIB)
    if wanted < one_context:
        raise SetupError(
            f"--engine.kv-cache-gib {wanted_gib}: one context of {context} tokens needs {one_context / GIB:.2f}; "
            f"raise it, or set --engine.max-model-len {wanted // geometry.kv_bytes_per_token}"
        )
    if wanted > free:
        raise SetupError(f"--engine.kv-cache-gib {wanted_gib}: only {free / GIB:.1f} are free beside the weights")
    return wanted


def check_gpu_memory(geometry: Geometry, context: int, machine: Machine, gpus: int, stages: int = 1) -> None:
    """Raises SetupError where weights and one context's KV cache do not fit the GPUs, and says what would.

    gpus    of this machine, which divide each layer evenly, so that the smallest decides
    stages  machines like this one that divide the layers evenly, weights and KV cache with them
    """
    room = gpus * (min(int(min(gpu.memory_total * 0.9, gpu.memory_free)) for gpu in machine.gpus[:gpus]) - GIB)
    weights = geometry.weight_bytes or 0
    need = weights + context * geometry.kv_bytes_per_token
    if need <= room * stages:
        return
    left = (room * stages - weights) // geometry.kv_bytes_per_token // 128 * 128
    cure = (
        f"--engine.max-model-len {left} would fit"
        if left >= 512
        else "use more GPUs (--engine.tensor-parallel-size) or 8-bit weights (-- --quantization fp8)"
    )
    of_stages = f" in each of {stages} stages" if stages > 1 else ""
    raise SetupError(
        f"the model does not fit: weights and one context of {context} tokens need {_gib(need)}, but {gpus} GPU(s)"
        f"{of_stages} have {_gib(room * stages)} to give; {cure}"
    )


def _geometry(model: str, config: dict[str, Any], weights: int | None, dtype: str) -> Geometry:
    architectures = config.get("architectures") or []
    if not any("Llama" in name or "Mistral" in name for name in architectures):
        raise SetupError(f"--model {model}: architecture {architectures or 'unknown'} is not a Llama architecture")
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    own = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    size, own_size = (_DTYPE_BYTES.get(name, 2) for name in (own if dtype == "auto" else dtype, own))
    if weights and "quantization_config" not in config:
        weights = weights * size // own_size
    kv_heads = config.get("num_key_value_heads") or heads
    return Geometry(
        context=config["max_position_embeddings"],
        heads=heads,
        kv_bytes_per_token=2 * config["num_hidden_layers"] * kv_heads * head_size * size,
        weight_bytes=weights,
    )


def _hub_geometry(model: str, dtype: str) -> Geometry | None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = json.loads(Path(hf_hub_download(model, "config.json")).read_text())
    except HFValidationError:
        raise SetupError(f"--model {model}: neither a folder nor a hub id of the form owner/name") from None
    except LocalEntryNotFoundError:
        raise SetupError(
            f"--model {model}: the model hub can't be reached and the model is not in its local cache; give a folder "
            "that holds the model, or --model demo"
        ) from None
    except HfHubHTTPError as error:
        raise SetupError(f"--model {model}: {error}") from None
    try:
        files = HfApi().model_info(model, files_metadata=True).siblings or []
    except (HfHubHTTPError, OSError):
        return _geometry(model, config, None, dtype)
    weights = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    return _geometry(model, config, weights or None, dtype)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
