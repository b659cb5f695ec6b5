"""Rendered files: objects as YAML, templates as text, and writing them where the operator wants them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from synthia_vllm.errors import SetupError

Files = dict[str, str]  # path below the target folder: text
SHIPPED = Path(__file__).parent / "shipped"
_ENVIRONMENT = Environment(
    loader=PackageLoader("synthia_vllm.manifests"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, lists set in, nothing by reference: as people write it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def to_yaml(*objects: Any, comment: str = "") -> str:
    """Objects as the documents of one YAML file, `comment` in its first lines."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    documents = (yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for one in objects)
    return head + "---\n".join(documents)


def fill(template: str, **values: Any) -> str:
    """A template of this package's folder `templates`, filled; a value that is missing is an error."""
    return _ENVIRONMENT.get_template(template).render(**values)


def shipped(folder: str) -> Files:
    """The files that we ship as they are, of `prometheus/rules` and the like, by their paths below the target.

    In a checkout they are links to the repository's `deploy/`; a wheel has copies.
    """
    root = SHIPPED / folder
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {f"{folder}/{path.relative_to(root)}": path.read_text() for path in found}


def write(files: Mapping[str, str], target: Path) -> list[Path]:
    """Writes what differs and returns those paths. Nothing is removed. Raises SetupError where it can't write."""
    changed = []
    try:
        for name, text in files.items():
            path = target / name
            if path.exists() and path.read_text() == text:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(path)
    except OSError as error:
        raise SetupError(
            f"--to {target}: {error.filename}: {error.strerror}; name a folder that you may write"
        ) from None
    return changed
