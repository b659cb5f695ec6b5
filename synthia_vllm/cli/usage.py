"""`synthia-vllm usage`."""

from dataclasses import asdict

import click

from synthia_vllm.cli.database import database_option, moment, open_from, show
from synthia_vllm.gateway.store.inputs import iso_time

_COLUMNS = ("requests", "refused", "prompt_tokens", "generated_tokens")


@click.command("usage")
@click.option("--user", help="Of this user only.")
@click.option("--since", help="A date like 2026-11-01 (UTC), or a span like 24h, 7d. Default: all.")
@click.option("--until", help="Likewise; not included.")
@click.option("--by", type=click.Choice(["day", "user", "model"]), default="user", show_default=True)
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@database_option
def command(user: str | None, since: str | None, until: str | None, by: str, form: str, database: str | None) -> None:
    """Add up the ledger: requests and tokens by user, day (UTC) or model. Refused requests cost nothing."""
    from synthia_vllm.gateway.store.usage import gaps, usage

    engine, _ = open_from(database, read_only=True)
    start, end = moment(since, "--since"), moment(until, "--until")
    rows = usage(engine, user=user, since=start, until=end, by=by)  # type: ignore[arg-type]
    asked = " that match" if user or since or until else ": none has been served"
    empty = f"No requests{asked} (database {engine.url.render_as_string()})"
    show([{by: row.name, **asdict(row)} for row in rows], [by, *_COLUMNS], form, empty)
    for gap in gaps(engine, start, end):
        click.echo(
            f"A server ended without a word: what it served after {iso_time(gap.since)} may be missing. "
            f"Under way then: {gap.requests} requests with {gap.tokens} tokens, {gap.tokens_most} at most.",
            err=True,
        )
