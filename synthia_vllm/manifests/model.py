"""Fetching the model onto a volume, and proof that it arrived as its publisher has it."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from synthia_vllm.errors import SetupError

SUMS = "SHA256SUMS"
_BLOCK = 2**22
_TELL_S = 15.0
# What vLLM and our prompt format read.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt")


def fetch_model(model: str, folder: Path, revision: str) -> dict[str, str]:
    """Downloads what is missing and returns the SHA-256 of each large file, as checked against the hub's own.

    The sums are written to SHA256SUMS beside the model, last: a folder with that file is whole, and
    `sha256sum --check SHA256SUMS` tells later whether it still is. Goes on after an interruption. Raises SetupError
    where the hub can't be reached or a file is not what the hub says.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(
            model, "config.json", revision=revision, local_dir=folder
        )  # tells in words of its own what fails
        # Whoever starts meanwhile waits until all of this revision is here.
        (folder / SUMS).unlink(missing_ok=True)
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
        snapshot_download(model, revision=info.sha, local_dir=folder, allow_patterns=list(_WANTED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SetupError(f"{model}: {str(error).splitlines()[0]}; is the hub reachable, and the name right?") from None
    sums = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs is not None}
    here = {name: digest for name, digest in sums.items() if (folder / name).exists()}
    if not here:
        raise SetupError(f"{model}: the hub names no checksum for any of its files; --revision a commit of the hub")
    check_sums(folder, here)
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(here.items())))
    return here


def await_model(folder: Path, tell: Callable[[str], None], *, pause_s: float = 5.0) -> None:
    """Returns once `fetch_model` has finished this folder; tells now and then how much of it is there."""
    told = -math.inf
    while not (folder / SUMS).is_file():
        if time.monotonic() - told >= _TELL_S:
            told = time.monotonic()
            gib = _bytes_below(folder) / 2**30
            tell(f"{folder}: {gib:.2f} GiB are there; waiting for {SUMS}, which `deploy fetch-model` writes last")
        time.sleep(pause_s)


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Raises SetupError for the first file that is not what its SHA-256 says; it is removed, to be fetched anew."""
    for name, expected in sorted(sums.items()):
        path = folder / name
        found = _sha256(path)
        if found != expected:
            path.unlink()
            raise SetupError(f"{path}: SHA-256 is {found}, and should be {expected}; it is removed: run this again")


def _bytes_below(folder: Path) -> int:
    found = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # one that has just got its name
            found += file.stat().st_size if file.is_file() else 0
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
