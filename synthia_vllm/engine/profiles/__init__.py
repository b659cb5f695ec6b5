"""vLLM options that were measured to be best on one hardware for one model; `serve` takes them where both fit.

`python -m benchmarks.gpu tune` writes the files `*.yaml` beside this module. What a user says wins, option by option.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from synthia_vllm.engine.hardware import Machine
from synthia_vllm.errors import SetupError

FOLDER = Path(__file__).parent
CPU = "CPU"
# What tells one model from another as far as speed goes. Source: config.json.
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_FEWER_BITS = {"quantization", "kv_cache_dtype"}
Value = bool | int | float | str | list[int] | dict[str, Any]


class Profile(BaseModel):
    """One file. `options` are vLLM's, with underscores; `measured` is what the search found, for the reader."""

    model_config = ConfigDict(extra="forbid")

    name: str
    hardware: str  # the GPU's name as nvidia-smi tells it, or CPU
    geometry: dict[str, int]
    options: dict[str, Value]
    measured: dict[str, Any] = {}

    def arguments(self, given: Sequence[str]) -> list[str]:
        """For vLLM's command line, without what is on it already."""
        taken = {word.split("=")[0] for word in given if word.startswith("--")}
        found: list[str] = []
        for name, value in self.options.items():
            flag = f"--{name.replace('_', '-')}"
            if not {flag, f"--no-{flag[2:]}"} & taken:
                found += _words(flag, value)
        return found


def hardware_of(machine: Machine) -> str:
    return machine.gpus[0].name if machine.gpus else CPU


def geometry_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a model's config.json that a profile goes by."""
    filled = {"num_key_value_heads": config.get("num_attention_heads"), **config}
    return {name: int(filled[name]) for name in _SIZES if filled.get(name) is not None}


def choose_profile(wanted: str, machine: Machine, config: Mapping[str, Any] | None) -> Profile | None:
    """`auto`: the one that fits hardware and model, if any; `none`; else a name or a file, wherever it was measured.

    A profile that changes what the model says, by fewer bits in weights or KV cache, is taken only where it is named.

    Raises SetupError for a name that is none and a file that is no profile.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        named = Path(wanted) if wanted.endswith((".yaml", ".yml")) else FOLDER / f"{wanted}.yaml"
        if not named.is_file():
            known = ", ".join(["auto", "none", *(path.stem for path in sorted(FOLDER.glob("*.yaml")))])
            raise SetupError(f"--engine.profile {wanted}: there is no such profile; there are {known}, and files")
        return read_profile(named)
    if config is None:
        return None
    profiles = map(read_profile, sorted(FOLDER.glob("*.yaml")))
    hardware, geometry = hardware_of(machine), geometry_of(config)
    fitting = [found for found in profiles if (found.hardware, found.geometry) == (hardware, geometry)]
    return next((found for found in fitting if not _FEWER_BITS & found.options.keys()), None)


def read_profile(file: Path) -> Profile:
    """Raises SetupError that names the file and the field."""
    try:
        return Profile.model_validate(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise SetupError(f"{file} is no profile: {error}") from None


def write_profile(profile: Profile, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    head = "# Written by `python -m benchmarks.gpu tune`; `serve` takes it where hardware and geometry fit.\n"
    file.write_text(head + yaml.safe_dump(profile.model_dump(), sort_keys=False, width=120))


def _words(flag: str, value: Value) -> list[str]:
    match value:
        case bool():
            return [flag if value else f"--no-{flag[2:]}"]
        case list():
            return [flag, *map(str, value)]
        case dict():
            return [flag, json.dumps(value)]
        case _:
            return [flag, str(value)]
