"""Settings as data, for files and other processes."""

from typing import Any

from pydantic import SecretStr

from synthia_vllm.settings.names import fields_with
from synthia_vllm.settings.tree import Settings

SECRETS = tuple(fields_with(SecretStr))  # never written down: they come as files, or by the environment


def dump(settings: Settings, **which: Any) -> dict[str, Any]:
    """What differs from the defaults, as JSON has it, less the secrets; `which` is pydantic's include and exclude."""
    dumped: dict[str, Any] = settings.model_dump(mode="json", exclude_defaults=True, **which)
    for *groups, name in SECRETS:
        within = dumped
        for group in groups:
            within = within.get(group, {})
        within.pop(name, None)
    return {key: value for key, value in dumped.items() if value != {}}
