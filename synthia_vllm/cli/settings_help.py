"""The --help of a command that takes settings: one screen of what is asked for first, and all of it by --help-all."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from synthia_vllm.settings import Settings, field_of, group_of, option_of

if TYPE_CHECKING:
    from synthia_vllm.cli.reads import Reads

_WIDTH = 110
_NUMBERS: dict[type, str] = {int: "N", float: "X"}


def help_text(reads: "Reads", *, everything: bool) -> str:
    """What a command is for and its options, with their defaults."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    page = click.HelpFormatter(width=width, max_width=width)
    page.write_usage(reads.prog, "[OPTIONS]" + (" [-- VLLM'S OWN OPTIONS]" if reads.vllm else ""))
    page.write_paragraph()
    page.write_text(reads.about)
    if everything:
        for title, rows in _sections(reads):
            with page.section(title):
                page.write_dl(rows)
    else:
        with page.section("Options"):
            rows = [_row(path, reads) for path in reads.first]
            page.write_dl([*rows, ("-h, --help", "this"), ("--help-all", "all options")])
        with page.section("Groups of options"):
            page.write_dl([(f"--{name}.…", _about(group)) for name, group in groups(reads)])
    page.write_paragraph()
    page.write_text(
        "Any option may also be in a YAML file (--config FILE) or the environment: --access.mode is mode below access "
        "there, and SYNTHIA_ACCESS__MODE."
    )
    return page.getvalue().rstrip("\n")


def groups(reads: "Reads") -> Iterator[tuple[str, type[BaseModel]]]:
    """The groups of settings that a command reads, whole or in part."""
    for name, field in Settings.model_fields.items():
        if (group := group_of(field)) is not None and reads.has(name):
            yield name, group


def _sections(reads: "Reads") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    own = [name for name, field in Settings.model_fields.items() if group_of(field) is None and reads.has(name)]
    yield "Options", [*(_row(name, reads) for name in own), ("-h, --help", "the first of them"), ("--help-all", "this")]
    for name, group in groups(reads):
        yield _about(group), [_row(path, reads) for path in _leaves(name, group) if reads.has(path)]


def _leaves(name: str, group: type[BaseModel]) -> Iterator[str]:
    for own, field in group.model_fields.items():
        inner = group_of(field)
        yield from _leaves(f"{name}.{own}", inner) if inner else [f"{name}.{own}"]


def _row(path: str, reads: "Reads") -> tuple[str, str]:
    field = field_of(path)
    assert field is not None
    names = [option_of(own) for own, whole in reads.short if whole == path] + [option_of(path)]
    if field.annotation is bool:
        return " / ".join((", ".join(names), option_of(path, no=True))), _described(field)
    return f"{', '.join(names)} {_metavar(field.annotation, path.rpartition('.')[2])}", _described(field)


def _described(field: FieldInfo) -> str:
    """The description, with the default where it does not tell that itself."""
    text, default = field.description or "", field.default
    if "default:" in text or default is None or default == []:
        return text
    told = ("yes" if default else "no") if isinstance(default, bool) else str(default)
    return f"{text} [{told}]" if told else text


def _metavar(annotation: Any, name: str) -> str:
    """`N`, `X` for a fraction, `a|b|c`, else the option's last word."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if parts:  # optional, a list, or Annotated
        return _metavar(parts[0], name)
    return _NUMBERS.get(annotation, name.rpartition("_")[2].upper())


def _about(group: type[BaseModel]) -> str:
    return (group.__doc__ or "").strip().splitlines()[0].rstrip(".")
