"""`synthia-vllm keys`."""

import math
from collections.abc import Callable
from typing import Any

import click

from synthia_vllm.cli.database import database_option, moment, open_from, show, span
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.accounts import MAX_LIMIT, UserLimits
from synthia_vllm.gateway.store.inputs import MAX_GRACE_S, iso_time, model_name, user_name
from synthia_vllm.prompt import MODEL_ALIASES

NONE = "none"


def _user(context: click.Context, option: click.Parameter, value: str) -> str:
    try:
        return user_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _models(context: click.Context, option: click.Parameter, value: tuple[str, ...]) -> list[str]:
    try:
        return [model_name(one) for one in value]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _number(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # which no range keeps out
        raise click.BadParameter("a number")
    return value


class _Limit(click.ParamType[int | str]):
    """A number, or `none`, which takes a limit away again."""

    name = f"INTEGER|{NONE}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, str) and value.lower() == NONE:
            return NONE
        found: int = click.IntRange(1, MAX_LIMIT).convert(value, param, ctx)
        return found


def _of_the_user(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what holds for a user, whichever of its keys is used."""
    options = [
        click.option("--user", required=True, callback=_user, help="Whom the key belongs to."),
        click.option(
            "--weight", type=click.FloatRange(0.001, 1000), callback=_number, help="Share of the engine under backlog."
        ),
        click.option("--priority", type=click.Choice(["interactive", "batch"]), help="Batch waits for interactive."),
        click.option("--requests-per-minute", type=_Limit()),
        click.option("--tokens-per-minute", type=_Limit(), help="Prompt and generated tokens."),
        click.option("--concurrent-requests", type=_Limit()),
        click.option("--tokens-per-month", type=_Limit(), help="Per calendar month, UTC."),
        click.option(
            "--models", multiple=True, callback=_models, help=f"Only these, several times; {NONE}: all again."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """What those options gave, in the store's words."""
    given["models"] = NONE if given["models"] == [NONE] else given["models"]
    unset = {name for name, value in given.items() if value == NONE}
    values = {name: None if name in unset else value for name, value in given.items()}
    limits = UserLimits(**{name: values.pop(name) for name in UserLimits.__slots__})
    return {**values, "limits": limits, "unset": unset}


@click.group("keys")
def command() -> None:
    """Make, list, rotate and revoke API keys, and set what their users may.

    `synthia-vllm keys create --user alice` makes the first one.
    A change is seen by every running server within two seconds.
    """


@command.command("create")
@_of_the_user
@click.option("--admin", is_flag=True, help="A key for /admin and /metrics, and for nothing else.")
@click.option("--expires", help="A date like 2027-01-31 or 2027-01-31T12:00+01:00 (else UTC), or a span like 30d.")
@database_option
def create(user: str, admin: bool, expires: str | None, database: str | None, **given: Any) -> None:
    """Make a key and print it, once; its user is made if need be. Other options hold for all keys of the user."""
    store = _store(database)
    ends = moment(expires, "--expires", future=True)
    holds = _settings_of(given)
    key_id, key = store.create(user, admin=admin, expires=ends, **holds)
    _tell(key_id, key, user)
    if ends is not None:
        click.echo(f"It ends at {iso_time(ends)}.", err=True)
    if others := [name for name in holds["models"] or () if name not in MODEL_ALIASES]:
        told = ", ".join(others)
        click.echo(f"Only a server knows whether it serves {told}: its /v1/models lists what this key opens.", err=True)


@command.command("set")
@_of_the_user
@database_option
def set_user(user: str, database: str | None, **given: Any) -> None:
    """Change what holds for a user; `none` takes a limit away again. Options that are left out stay as they are."""
    _store(database).change(user, **_settings_of(given))
    click.echo(f"{user} is changed", err=True)


@command.command("list")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@database_option
def list_keys(form: str, database: str | None) -> None:
    """Show all keys with their users; never what would open anything."""
    from synthia_vllm.gateway.store.keys import KeyStore

    store = KeyStore(open_from(database, read_only=True)[0], b"")  # nothing is looked up by its hash
    users = {user["name"]: user for user in store.list_users()}
    rows = []
    for key in store.list_keys():
        times = {name: iso_time(key[name]) for name in ("created", "expires", "revoked")}
        rows.append({**users[key["user"]], **key, **times})
    columns = ["id", "user", "admin", "weight", "priority", "requests_per_minute", "tokens_per_minute"]
    columns += ["concurrent_requests", "tokens_per_month", "models", "created", "expires", "revoked"]
    show(rows, columns, form, "No keys yet; make one: synthia-vllm keys create --user NAME")


@command.command("rotate")
@click.argument("key_id")
@click.option("--grace", default="0s", show_default=True, help="How long the old key still opens: 1h, 7d.")
@database_option
def rotate(key_id: str, grace: str, database: str | None) -> None:
    """Make a new key in the place of KEY_ID and print it, once."""
    seconds = span(grace)
    if seconds is None or seconds > MAX_GRACE_S:
        raise SetupError(f"--grace {grace!r}: a span like 30m, 12h, 7d, of at most {MAX_GRACE_S / 86_400:.0f}d")
    new_id, key = _store(database).rotate(key_id, seconds)
    _tell(new_id, key, f"instead of {key_id}")


@command.command("revoke")
@click.argument("key_id")
@database_option
def revoke(key_id: str, database: str | None) -> None:
    """End KEY_ID, on every running server within two seconds."""
    _store(database).revoke(key_id)
    click.echo(f"{key_id} is revoked", err=True)


def _store(database: str | None) -> Any:
    from synthia_vllm.gateway.store.keys import KeyStore, load_secret

    engine, settings = open_from(database)
    return KeyStore(engine, load_secret(settings))


def _tell(key_id: str, key: str, whose: str) -> None:
    click.echo(key)  # alone on stdout: KEY=$(synthia-vllm keys create …)
    click.echo(f"Key {key_id} ({whose}). It is shown this once; only its hash is kept.", err=True)
