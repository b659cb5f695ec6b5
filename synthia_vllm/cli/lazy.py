"""Groups of commands whose modules are imported when they run (click's documentation, *Lazily Loading Subcommands*)."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """`lazy` maps a name to a module, whose `command` it is, and one line of help: --help imports none of them.

    `cure` says where the packages come from that these commands need beyond our own; a missing one is named with it.
    """

    def __init__(
        self, *args: Any, lazy: Mapping[str, tuple[str, str]], cure: str | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.lazy = lazy
        self.cure = cure

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        command = importlib.import_module(self.lazy[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if nearest := difflib.get_close_matches(args[0], self.lazy, n=1):
                raise click.UsageError(f"{error.message} Did you mean {nearest[0]!r}?", error.ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        # A command may import what it needs late.
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if self.cure is None:
                raise
            message = f"{ctx.info_name} needs {error.name}, which is not installed; {self.cure}"
            raise click.ClickException(message) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])
