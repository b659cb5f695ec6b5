"""The YAML file of settings: read strictly, and what is wrong with it is told with its place."""

from pathlib import Path
from typing import Any

import yaml

from synthia_vllm.errors import SetupError


def read_config(path: str) -> dict[str, Any]:
    """The settings of a file. Raises SetupError that tells what is wrong, and where."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise SetupError(f"--config {path}: there is no such file") from None
    except OSError as error:
        raise SetupError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise SetupError(f"--config {path!r}: {error}") from None
    try:
        found = yaml.load(data, _Loader)
    except yaml.MarkedYAMLError as error:
        raise SetupError(f"--config {path}: {_place(error.problem_mark or error.context_mark)}{_text(error)}") from None
    except yaml.reader.ReaderError as error:
        line = data[: int(error.position)].count(b"\n") + 1
        raise SetupError(f"--config {path}: line {line}: {error.reason}; it has to be UTF-8 text") from None
    except RecursionError:
        raise SetupError(f"--config {path}: nested too deep") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SetupError(f"--config {path}: line 1: settings are `name: value`, one a line, not {_kind(found)}")
    return found


class _Loader(yaml.SafeLoader):
    """YAML without its surprises: no key twice, and no value that is an error without a place."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError, TypeError):
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"not a {kind}", node.start_mark) from None


def _timestamp(loader: Any, node: Any) -> Any:
    return loader.construct_yaml_timestamp(node)


# lm-format-enforcer, which vLLM imports, makes timestamps text in PyYAML's table for the whole process.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _timestamp)


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _text(error: yaml.MarkedYAMLError) -> str:
    return " ".join(part for part in (error.problem, error.context) if part) or "not YAML"


def _kind(found: Any) -> str:
    if isinstance(found, dict):
        return "names that are no text"
    return "a list" if isinstance(found, list) else "a single value"
