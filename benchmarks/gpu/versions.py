"""Does the vLLM that is installed fit the torch that is: a machine without a network often brings its own torch."""

import importlib.metadata
from collections.abc import Callable

from synthia_vllm.engine.private_vllm import FITTING, installed_vllm
from synthia_vllm.errors import SetupError


def check_versions(say: Callable[[str], None]) -> None:
    """Says which pair there is. Raises SetupError with the command that makes one that fits."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError("torch is not installed: `make install`") from None
    say(judge(torch, installed_vllm()))


def judge(torch: str, vllm: str | None) -> str:
    """What to tell. Raises SetupError where the two don't fit."""
    short = ".".join(torch.partition("+")[0].split(".")[:2])
    wanted = FITTING.get(short)
    if vllm is None or (wanted is not None and vllm.partition("+")[0] != wanted):
        cure = f"pip install vllm=={wanted}" if wanted else "install a vLLM that is made for it"
        raise SetupError(
            f"torch {torch} is here and {f'vLLM {vllm}' if vllm else 'no vLLM'}: {cure}"
            + (f" (the vLLM for torch {short}); without a network: --no-index --find-links FOLDER" if wanted else "")
        )
    if wanted is None:
        known = ", ".join(f"{name} with vLLM {version}" for name, version in FITTING.items())
        return f"torch {torch} with vLLM {vllm}: not a pair that was checked; those are {known}"
    return f"torch {torch} with vLLM {vllm}, which is the one that fits it"
