"""`synthia-vllm deploy render|fetch-model|await-model|drain`."""

from pathlib import Path

import click

from synthia_vllm.cli.reads import RENDER, settings_for

KINDS = ("compose", "helm", "k8s", "ray", "systemd")


@click.group("deploy", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Files for operators, made from the settings; and what runs beside the server there."""


@command.command("render", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def render_command(vllm_options: list[str] | None, kind: str, words: tuple[str, ...]) -> None:
    """Write the files of one KIND below --to FOLDER (default: deploy); --help after the kind lists the settings."""
    from synthia_vllm.manifests.files import write
    from synthia_vllm.manifests.render import render

    folder, rest = _target(words)
    settings = settings_for(RENDER, rest)
    files = render(kind, settings, vllm_options or [])
    changed = write(files, folder)
    for path in changed:
        click.echo(path)
    click.echo(f"{len(changed)} of {len(files)} files written below {folder}; see the README beside them", err=True)


@command.command("fetch-model")
@click.argument("model")
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="its folder")
@click.option("--revision", default="main", show_default=True, help="commit on the hub; a branch moves")
def fetch_model_command(model: str, folder: Path, revision: str) -> None:
    """Download MODEL from the hub and check each large file's SHA-256; goes on where it was interrupted."""
    from synthia_vllm.manifests.model import SUMS, fetch_model

    sums = fetch_model(model, folder, revision)
    click.echo(f"{model}: {len(sums)} files checked; {folder / SUMS}")


@command.command("await-model")
@click.argument("folder", type=click.Path(path_type=Path))
def await_model_command(folder: Path) -> None:
    """Wait until `deploy fetch-model` has finished FOLDER, however long that takes, and say how far it is."""
    from synthia_vllm.manifests.model import await_model

    await_model(folder, lambda line: click.echo(line, err=True))
    click.echo(f"{folder} is there", err=True)


@command.command("drain")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0), default=600.0, show_default=True, help="longest wait")
def drain_command(port: int, seconds: float) -> None:
    """Wait until no client is connected to the port any more; exit code 1 where time ran out."""
    from synthia_vllm.manifests.drain import drain

    if not drain(port, seconds):
        click.echo(f"port {port} still has connections after {seconds:g} s", err=True)
        raise SystemExit(1)


def _target(words: tuple[str, ...]) -> tuple[Path, list[str]]:
    """`--to FOLDER`, which is not a setting, and the other words."""
    rest = list(words)
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name != "--to":
            continue
        if not equals and index + 1 == len(rest):
            raise click.BadParameter("a folder follows", param_hint="--to")
        folder = value if equals else rest.pop(index + 1)
        rest.pop(index)
        return Path(folder), rest
    return Path("deploy"), rest
