"""A password in a setting is nowhere told: not where it is right, and not where its URL is malformed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from sqlalchemy.exc import OperationalError

from synthia_vllm.cli.cluster import config_text
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.app import check_stores
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.observers.log import configure_logging
from synthia_vllm.manifests.render import render
from synthia_vllm.settings import SECRETS, LogSettings, Settings, Untold, fields_with, load_settings

MARK = "hush7hush"
URLS = {
    "access.database": "postgresql+psycopg://me:\0@127.0.0.1:1/db",
    "limits.redis": "redis://:\0@127.0.0.1:1/0",
    "upstream": "http://me:\0@127.0.0.1:1",
    "tracing.otlp-endpoint": "http://me:\0@127.0.0.1:1/v1/traces",
    "deploy.gcs-redis": ":\0@127.0.0.1:1",
}


@st.composite
def malformed(draw: st.DrawFn, url: str) -> str:
    """A URL with a password of two halves and whatever between them, of which some characters are wrong."""
    text = url.replace("\0", "\0" + draw(st.sampled_from(["", *"@/:#?%[]\\ '\"&=+"])) + "\0")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.sampled_from([place for place, letter in enumerate(text) if letter != "\0"]))
        text = text[:at] + draw(st.sampled_from(["", *"@/:#?%[]\\ '\"&=x"])) + text[at + draw(st.integers(0, 1)) :]
    return text.replace("\0", MARK)


def by_option(name: str, url: str) -> tuple[list[str], dict[str, str]]:
    return [f"--{name}", url], {}


def in_one_word(name: str, url: str) -> tuple[list[str], dict[str, str]]:
    return [f"--{name}={url}"], {}


def misspelt(name: str, url: str) -> tuple[list[str], dict[str, str]]:
    return [f"--{name}s", url], {}


def for_the_group(name: str, url: str) -> tuple[list[str], dict[str, str]]:
    return [f"--{name.partition('.')[0]}", url], {}


def by_variable(name: str, url: str) -> tuple[list[str], dict[str, str]]:
    return [], {f"SYNTHIA_{name.replace('.', '__').replace('-', '_').upper()}": url}


def by_variable_of_the_group(name: str, url: str) -> tuple[list[str], dict[str, str]]:
    return [], {f"SYNTHIA_{name.partition('.')[0].upper()}": json.dumps({name.partition(".")[2]: url})}


WAYS = [by_option, in_one_word, misspelt, for_the_group, by_variable, by_variable_of_the_group]


def unreachable(engine: Any) -> None:
    """As a driver tells, with what it knows of the address."""
    where = f'connection to server at "{engine.url.host}", port {engine.url.port} failed: Connection refused'
    raise OperationalError("", None, Exception(where))


def told(argv: list[str], environment: dict[str, str]) -> str:
    """All that a command says of its settings before it serves, or where it doesn't."""
    with patch.dict(os.environ, environment), patch("synthia_vllm.gateway.store.database.migrate", unreachable):
        try:
            found = load_settings(argv)
        except SetupError as error:
            return str(error)
        said = [repr(found), str(found)]
        try:
            said.append(config_text(found.model_copy(update={"model": "demo"}), []))
            said += render("compose", found, []).values()
            said.append(check_stores(found))
        except SetupError as error:
            said.append(str(error))
        return "\n".join(said)


@pytest.mark.parametrize("name", URLS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), way=st.sampled_from(WAYS))
def test_whatever_is_wrong_with_a_url_its_password_is_not_told(
    name: str, capfd: pytest.CaptureFixture[str], data: st.DataObject, way: Callable[..., Any]
) -> None:
    text = told(*way(name, data.draw(malformed(URLS[name]))))
    out, err = capfd.readouterr()
    assert MARK not in text + out + err


@pytest.mark.parametrize(
    "form", ["limits: {{redis: {}}}", "limits: {}", "limits: {{{}: }}", "{}: 1", "- {}", "limits: {{redis: [{}]}}"]
)
def test_a_file_of_settings_that_is_wrong_does_not_tell_either(tmp_path: Path, form: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(form.format(f"redis://:{MARK}@host:port/0"))
    text = told(["--config", str(file)], {})
    assert text
    assert MARK not in text


@pytest.mark.parametrize(
    "words",
    [
        ["gateway", "--upstream", "http://127.0.0.1:1", "--limits.redis", f"redis://:{MARK}@h:x"],
        ["gateway", f"redis://:{MARK}@h:x"],
        ["serve", "--port", "0", "--access.database", f"postgresql+psycopg://me:{MARK}@{MARK}@127.0.0.1/db"],
        ["doctor", "--access.database", f"postgresql+psycopg://me:{MARK}@127.0.0.1:1/db?password={MARK}"],
        ["doctor", "--limits.redis", f"redis://{MARK}/{MARK}@h"],
        ["keys", "list", "--database", f"postgresql+psycopg://me:{MARK}@127.0.0.1:x/db"],
        ["keys", "list", "--databases", f"postgresql+psycopg://me:{MARK}@127.0.0.1:1/db"],
        ["keys", "list", f"postgresql+psycopg://me:{MARK}@127.0.0.1:1/db"],
        ["keys", "list", f"--format=postgresql+psycopg://me:{MARK}@127.0.0.1:1/db"],
        ["usage", f"postgresql+psycopg://me:{MARK}@127.0.0.1:1/db"],
        [f"postgresql+psycopg://me:{MARK}@127.0.0.1:1/db"],
    ],
    ids=lambda words: " ".join(words).replace(MARK, "…"),
)
def test_a_command_that_fails_does_not_tell(words: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"SYNTHIA_DATA": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "synthia_vllm", *words], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode != 0
    assert MARK not in done.stdout + done.stderr


async def test_the_log_of_a_redis_that_is_gone_has_no_password(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = structlog.get_config()
    configure_logging(LogSettings(format="json"))
    try:
        limiter = SharedLimiter(f"redis://me:{MARK}@127.0.0.1:1/0")
        await limiter.reserve("a", UserLimits(requests_per_minute=1), "1", 1)
        await limiter.close()
    finally:
        structlog.configure(**before)
    text = capfd.readouterr().err
    assert "shared_limits_lost" in text
    assert MARK not in text


def test_every_setting_that_may_hold_a_secret_is_of_a_type_that_hides_it() -> None:
    """Those whose description tells of a password, a key or a URL."""
    hidden = {*SECRETS, *fields_with(Untold)}
    suspects = {
        path
        for path, field in leaves(Settings)
        if re.search(r"password|secret|API key|://", field.description or "") and str in strings(field.annotation)
    }
    assert suspects - hidden == {("cors_origins",)}


def test_an_error_of_the_types_does_not_repeat_what_was_given() -> None:
    with pytest.raises(ValidationError) as error:
        Settings(limits={"redis": f"redis://:{MARK}@h:x"}, access={"database": [MARK]})  # type: ignore[arg-type]
    assert MARK not in str(error.value)


def leaves(model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (((name, *path), leaf) for path, leaf in leaves(field.annotation))
        else:
            yield (name,), field


def strings(annotation: Any) -> set[Any]:
    """The types that a type is made of."""
    return {annotation}.union(*map(strings, get_args(annotation)))
