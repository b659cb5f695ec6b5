"""Settings from a command line, the environment and files; what is wrong is told by its option, in one line."""

import difflib
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliSettingsSource, SettingsError

from synthia_vllm.errors import SetupError
from synthia_vllm.secret_urls import without
from synthia_vllm.settings.kinds import Untold
from synthia_vllm.settings.names import field_of, fields_with, group_of, new_path, option_of, options, path_of
from synthia_vllm.settings.tree import CONFIG_VARIABLE, DELIMITER, PREFIX, SECRETS_VARIABLE, Settings


def load_settings(argv: Sequence[str] = ()) -> Settings:
    """The settings from all sources; `argv` is a command line without the command's name.

    Raises SetupError that names the option, its value and what would be right.
    """
    config = _option(argv, "--config")
    if config is not None:
        os.environ[CONFIG_VARIABLE] = config
    secrets = os.environ.get(SECRETS_VARIABLE)
    if secrets and not Path(secrets).is_dir():
        raise SetupError(f"{SECRETS_VARIABLE} {secrets}: there is no such folder; it holds one file a secret")
    try:
        source: CliSettingsSource[Settings] = CliSettingsSource(
            Settings, cli_parse_args=list(argv), cli_exit_on_error=False, parse_args_method=_parse
        )
        return Settings(_cli_settings_source=source)  # type: ignore[call-arg]
    except ValidationError as error:
        raise _explained(error) from None
    except SettingsError as error:  # a command line or a variable that can't be read at all
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise SetupError(without(f"{str(error).removeprefix('error parsing CLI: ')}{cause}", argv)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{SECRETS_VARIABLE} {secrets}: {error}") from None


def settings_of(data: Mapping[str, Any]) -> Settings:
    """The settings that another process was given as data. Raises SetupError as `load_settings` does."""
    try:
        return Settings(**data)
    except ValidationError as error:
        raise _explained(error) from None


def _parse(parser: ArgumentParser, argv: Sequence[str], namespace: Namespace | None = None) -> Namespace:
    """Parses a command line, and refuses what it does not know without telling all that it does know."""
    if groups := [name for word in argv if _is_group(name := word.partition("=")[0])]:  # pydantic would take JSON
        raise SetupError("\n".join(map(_no_such, groups)))
    found, unknown = parser.parse_known_args(argv, namespace)
    if unknown:
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        raise SetupError(
            "\n".join(map(_no_such, options)) or without(f"{unknown[0]!r} belongs to no option; see --help", unknown)
        )
    return found


def _is_group(word: str) -> bool:
    field = field_of(path_of(word)) if word.startswith("--") else None
    return field is not None and group_of(field) is not None


def _no_such(option: str) -> str:
    if not re.fullmatch(r"[\w.-]+", option):  # it may be a URL with its password
        return "a value stands where the name of an option should be; see --help"
    usual = option.replace("_", "-").lower()
    if (moved := new_path(path_of(usual))) is not None:
        return _moved(option, moved)
    known = list(options())
    below = [it for it in known if it.endswith(f".{usual.lstrip('-')}")]  # its group was left out
    if _is_group(option):
        below = [*below, f"one of {option}.…"]
    nearest = [" or ".join(below)] if below else difflib.get_close_matches(usual, known, n=1)
    if nearest == [option]:  # right on the command line
        return f"{option[2:]}: in a file it is written {option[2:].replace('-', '_')}"
    return f"{option}: there is no such option; {f'did you mean {nearest[0]}?' if nearest else 'see --help'}"


def _moved(option: str, path: str) -> str:
    group, _, name = path.partition(".")
    variable = f"{PREFIX}{group}{DELIMITER}{name}".upper()
    return f"{option}: it is {option_of(path)} now, in the environment {variable}, in a file {name} below {group}"


def _option(argv: Sequence[str], name: str) -> str | None:
    """The value of one option, wanted before the parser can run (the parser's defaults come from that file)."""
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _explained(error: ValidationError) -> SetupError:
    return SetupError("\n".join(map(_explain, error.errors())))


def _explain(problem: ErrorDetails) -> str:
    option = "--" + ".".join(str(part).replace("_", "-") for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _no_such(option)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    told = tuple(str(part) for part in problem["loc"])
    kept = any(path[: len(told)] == told[: len(path)] for path in (*fields_with(SecretStr), *fields_with(Untold)))
    value = "" if kept else without(f" {problem['input']!r}", [str(problem["input"])])
    return f"{option}{value}: {message.removeprefix('value error, ')}"


def refuse_gateways_options(settings: Settings, prog: str) -> None:
    """For a command that loads its own engine. Raises SetupError where engines elsewhere are named."""
    for name in ("upstream", "upstream_key", "resume", "tokenizer"):
        if getattr(settings, name) != Settings.model_fields[name].default:
            raise SetupError(
                f"--{name.replace('_', '-')}: `{prog}` loads an engine here and asks none elsewhere; "
                "use `synthia-vllm gateway`, or leave it out"
            )
