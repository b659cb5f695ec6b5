"""What the commands on keys and usage share: the database, times, and how results are printed."""

import csv
import io
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.store.inputs import end_time, unix_time
from synthia_vllm.secret_urls import reveal
from synthia_vllm.settings import Settings, load_settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

database_option = click.option(
    "--database", help="SQLAlchemy URL (default: as set for the server, else SQLite in the data folder)."
)


def open_from(database: str | None, *, read_only: bool = False) -> tuple["Engine", Settings]:
    """The database of the settings (environment, YAML), unless one is named."""
    from synthia_vllm.gateway.store.database import open_database

    settings = load_settings([])
    return open_database(database or reveal(settings.access.database), read_only=read_only), settings


def span(text: str) -> float | None:
    """Seconds of `30d`, `12h`, `15m`; None for what is no span."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip())
    return int(found[1]) * _UNITS[found[2]] if found else None


def moment(text: str | None, option: str, *, future: bool = False) -> float | None:
    """A Unix time from a date, a date and time, or a span before now (after now for `future`).

    Raises SetupError that names the option.
    """
    if text is None:
        return None
    seconds = span(text)
    try:
        if seconds or (seconds == 0 and not future):
            return (datetime.now(UTC) + timedelta(seconds=seconds if future else -seconds)).timestamp()
        return end_time(text) if future else unix_time(text)
    except (ValueError, OverflowError) as error:
        raise SetupError(f"{option} {text!r}: {error}; or a span like 30d, 12h, 15m") from None


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str], form: str, empty: str) -> None:
    """Prints rows as a table for people, or as CSV or JSON for programs; `empty` tells people that there are none."""
    if form == "json":
        click.echo(json.dumps([{name: row[name] for name in columns} for row in rows], indent=1))
    elif form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        click.echo(text.getvalue(), nl=False)
    elif not rows:
        click.echo(empty, err=True)
    else:
        table = Table(*(name.replace("_", " ") for name in columns), box=None)
        for row in rows:
            table.add_row(*(_cell(row[name]) for name in columns))
        Console(width=None if Console().is_terminal else 200).print(table)


def _cell(value: Any) -> Text:
    """Text as it is: a model's name is the client's, and neither markup nor a terminal's command."""
    return Text("" if value is None else "".join(c if c.isprintable() else "\ufffd" for c in str(value)))
