"""The command `synthia-vllm`: one module a command, imported when it is run."""

import io
import sys

import click

from synthia_vllm import __version__
from synthia_vllm.cli.lazy import LazyGroup
from synthia_vllm.errors import SetupError, SynthiaError

# name: (module, one line of help). Listed here so that --help imports none of them.
COMMANDS = {
    "serve": ("synthia_vllm.cli.serve", "Serve the model on this machine (OpenAI and Anthropic APIs)."),
    "chat": ("synthia_vllm.cli.chat", "Talk to a running server."),
    "gateway": ("synthia_vllm.cli.gateway", "Keys, limits, fair sharing and the bill before engines elsewhere."),
    "cluster": ("synthia_vllm.cli.cluster", "Serve with several replicas on Ray: up, status, down, config."),
    "keys": ("synthia_vllm.cli.keys", "Make, list, rotate and revoke API keys."),
    "usage": ("synthia_vllm.cli.usage", "Tell who used how many tokens."),
    "batch": ("synthia_vllm.cli.batch", "Run an OpenAI batch file offline."),
    "exporter": ("synthia_vllm.cli.exporter", "Metrics of engines that run elsewhere, as one page for Prometheus."),
    "top": ("synthia_vllm.cli.top", "Watch a running server: replicas, users, tokens a second, latencies."),
    "bench": ("synthia_vllm.cli.bench", "Measure: throughput, latency, fairness, limits; against other servers."),
    "deploy": ("synthia_vllm.cli.deploy", "Write files for Kubernetes, Compose, Ray's launcher or systemd."),
    "eval": ("synthia_vllm.cli.eval", "The model card's evaluation table, by lm-evaluation-harness."),
    "doctor": ("synthia_vllm.cli.doctor", "Tell what would stop or slow down `serve` on this machine."),
}

_STARTING_VLLM = ("serve", "cluster", "deploy", "eval", "doctor")  # doctor: looks at the options of serve


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="synthia-vllm")
@click.pass_context
def cli(context: click.Context) -> None:
    """Synthia-v3.0-11B for many users: vLLM behind the Synthia prompt contract.

    Start with `synthia-vllm serve`, then `synthia-vllm chat` in another terminal.
    """
    if context.obj and context.invoked_subcommand not in _STARTING_VLLM:
        raise SetupError(f"--: what follows is vLLM's, and `{context.invoked_subcommand}` starts none; leave it out")


def main() -> None:
    """Entry point. An error of ours is one line and exit code 2; Ctrl-C is 130."""
    own, vllm_options = split_options(sys.argv[1:])
    try:
        cli(own, prog_name="synthia-vllm", standalone_mode=False, obj=vllm_options)
    except click.ClickException as error:
        from synthia_vllm.secret_urls import without

        told = io.StringIO()
        error.show(told)
        click.echo(without(told.getvalue(), sys.argv[1:]), err=True, nl=False)
        sys.exit(error.exit_code)
    except SynthiaError as error:
        click.echo(f"synthia-vllm: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def split_options(words: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and what comes after `--` for vLLM."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]
