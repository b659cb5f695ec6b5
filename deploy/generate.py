"""Writes the files that operators copy, from the settings beside them: `python -m deploy.generate`."""

import os
from pathlib import Path
from unittest.mock import patch

from synthia_vllm.manifests.files import Files, write
from synthia_vllm.manifests.render import render
from synthia_vllm.settings import load_settings

FOLDER = Path(__file__).parent
# Each kind and the settings that it is rendered from; None: the defaults.
_SOURCES: list[tuple[str, Path | None]] = [
    *(("k8s", path) for path in sorted(FOLDER.glob("kubernetes/presets/*.yaml"))),
    ("helm", FOLDER / "kubernetes" / "presets" / "single-gpu.yaml"),
    ("compose", None),
    ("systemd", None),
    ("ray", FOLDER / "ray" / "example.yaml"),
]


def generated() -> Files:
    """All files by their paths below this folder. The shell's own settings play no part."""
    files: Files = {}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SYNTHIA_")}
    for kind, config in _SOURCES:
        with patch.dict(os.environ, clean, clear=True):
            files |= render(kind, load_settings(["--config", str(config)] if config else []), [])
    return files


def main() -> None:
    """Writes what differs."""
    for path in write(generated(), FOLDER):
        print(path)


if __name__ == "__main__":
    main()
