"""The names of settings: `group.some_field` as a path, `--group.some-field` as an option."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from synthia_vllm.settings.tree import Settings

# Groups that were part of another one: who upgrades is told the new names of their fields.
_PARTED_FROM = {"scaling": "cluster", "replicas": "cluster"}


def fields_with(wanted: Any, model: type[BaseModel] = Settings) -> list[tuple[str, ...]]:
    """Paths of all settings whose type mentions something: `SecretStr` for those that hold a secret."""

    def mentions(annotation: Any) -> bool:
        return annotation is wanted or any(mentions(part) for part in get_args(annotation))

    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        if (group := group_of(field)) is not None:
            found += [(name, *path) for path in fields_with(wanted, group)]
        elif mentions(field.annotation):
            found.append((name,))
    return found


def field_of(path: str) -> FieldInfo | None:
    """The setting, or the group of settings, at `group.field`; None where there is none."""
    model: type[BaseModel] | None = Settings
    field = None
    for name in path.split("."):
        field = model.model_fields.get(name) if model else None
        model = group_of(field) if field else None
    return field


def group_of(field: FieldInfo) -> type[BaseModel] | None:
    """The group of settings that a field is, if it is one."""
    found = field.annotation
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def option_of(path: str, *, no: bool = False) -> str:
    """`--group.some-field`, or the option that says no to it."""
    return f"--{'no-' if no else ''}{path.replace('_', '-')}"


def path_of(option: str) -> str:
    """`group.some_field` of an option, of one that says no to it as well."""
    path = option.removeprefix("--").replace("-", "_")
    positive = path.removeprefix("no_")
    return positive if field_of(path) is None and field_of(positive) else path


def new_path(path: str) -> str | None:
    """Where a setting is now that was at `group.field`; None where it was not."""
    group, _, name = path.partition(".")
    moved = [f"{new}.{name}" for new, old in _PARTED_FROM.items() if old == group]
    return next((found for found in moved if field_of(found) is not None), None)


def options(model: type[BaseModel] = Settings, prefix: str = "--") -> Iterator[str]:
    """All options, as the command line has them."""
    for name, field in model.model_fields.items():
        option = prefix + name.replace("_", "-")
        inner = group_of(field)
        yield from options(inner, f"{option}.") if inner else [option]
