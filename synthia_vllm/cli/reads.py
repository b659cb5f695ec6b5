"""Which settings each command reads: its command line may have no others, and its --help shows no others.

A file and the environment may have them all the same, since several commands share one file.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click

from synthia_vllm.cli.settings_help import help_text
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings, field_of, group_of, load_settings, option_of, path_of

# What a gateway is, wherever its engines are.
_GATEWAY = (
    *(
        "config",
        "host",
        "port",
        "insecure",
        "drain_timeout",
        "max_body_bytes",
        "page",
        "openapi",
        "cors_origins",
        "prompt",
    ),
    *("access", "limits", "fair", "timeouts", "log", "slo", "metrics", "tracing"),
)
_ADMIN = ("admin_port", "admin_host")
_ENGINES_ELSEWHERE = ("upstream", "upstream_key")


@dataclass(frozen=True)
class Reads:
    """A command's settings.

    settings   names of fields and groups of `Settings`, or `group.field` of a group that it reads in part
    unread     `group.field` of those groups that it does not read all the same
    first      those that its --help tells of; --help-all has all
    short      other names that this command has for some: `--replicas` for `--cluster.replicas`
    vllm       whether it takes vLLM's own options after two dashes
    """

    prog: str
    about: str
    settings: tuple[str, ...]
    first: tuple[str, ...]
    short: tuple[tuple[str, str], ...] = ()
    vllm: bool = False
    unread: tuple[str, ...] = ()

    def has(self, path: str) -> bool:
        """Whether it reads `field`, `group.field`, or some of `group`."""
        if path in self.unread:
            return False
        return any(path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.") for name in self.settings)


SERVE = Reads(
    "synthia-vllm serve",
    "Serve Synthia on this machine: an OpenAI- and Anthropic-compatible server that speaks the Synthia format.",
    (*_GATEWAY, *_ADMIN, "model", "engine", "gateways", "log_file"),
    (
        *("model", "host", "port", "insecure", "access.mode", "engine.max_model_len", "engine.kv_cache_gib"),
        *("engine.tensor_parallel_size", "limits.requests_per_minute", "fair.max_wait_s", "log_file", "config"),
    ),
    vllm=True,
)
DOCTOR = Reads(
    "synthia-vllm doctor",
    "Look at this machine with the options that `serve` would get; exit code 1 if it would not start.",
    SERVE.settings,
    ("model", "host", "port", "access.mode", "engine.max_model_len", "engine.kv_cache_gib", "config"),
    vllm=True,
)
GATEWAY = Reads(
    "synthia-vllm gateway",
    "Keys, limits, fair sharing and the bill in front of engines that run elsewhere.",
    (*_GATEWAY, *_ADMIN, *_ENGINES_ELSEWHERE, "resume", "gateways", "tokenizer", "engine.max_model_len", "replicas"),
    (
        *("upstream", "upstream_key", "tokenizer", "host", "port", "insecure", "access.mode", "access.database"),
        *("gateways", "limits.redis", "fair.gateways", "fair.max_wait_s", "config"),
    ),
)
EXPORTER = Reads(
    "synthia-vllm exporter",
    "One page of metrics for engines that run elsewhere, without a gateway in front of them.",
    (
        *("config", "host", "port", "insecure", "drain_timeout", "max_body_bytes", *_ENGINES_ELSEWHERE),
        *("access", "metrics", "timeouts", "log"),
    ),
    ("upstream", "upstream_key", "host", "port", "insecure", "access.mode", "metrics.replica_wait_s", "config"),
)
_CLUSTER = (*_GATEWAY, "model", "engine", "cluster", "scaling", "replicas", "log_file")
_CLUSTER_FIRST = (
    *("model", "cluster.replicas", "scaling.max_replicas", "cluster.gateways", "cluster.address", "host", "port"),
    *("access.mode", "access.database", "limits.redis", "engine.max_model_len", "config"),
)
_CLUSTER_SHORT = tuple((name, f"cluster.{name}") for name in ("replicas", "address", "gateways"))
_CLUSTER_UNREAD = ("engine.fork",)  # Ray starts vLLM's processes
CLUSTER_UP = Reads(
    "synthia-vllm cluster up",
    "Start the cluster, or roll the one that runs to other options.",
    _CLUSTER,
    _CLUSTER_FIRST,
    _CLUSTER_SHORT,
    vllm=True,
    unread=_CLUSTER_UNREAD,
)
CLUSTER_CONFIG = Reads(
    "synthia-vllm cluster config",
    "Print what `up` would deploy, as a Serve config for `serve deploy` and KubeRay.",
    _CLUSTER,
    _CLUSTER_FIRST,
    _CLUSTER_SHORT,
    vllm=True,
    unread=_CLUSTER_UNREAD,
)
RENDER = Reads(
    "synthia-vllm deploy render KIND",
    "Write the files of one KIND below --to FOLDER (default: deploy).",
    tuple(Settings.model_fields),
    (
        *("model", "deploy.image", "deploy.namespace", "cluster.replicas", "access.database", "limits.redis"),
        *("engine.max_model_len", "config"),
    ),
    vllm=True,
)
COMMANDS = (SERVE, GATEWAY, CLUSTER_UP, CLUSTER_CONFIG, EXPORTER, RENDER, DOCTOR)


def settings_for(reads: Reads, words: Sequence[str]) -> Settings:
    """A command's settings from its command line; --help and --help-all end it here.

    Raises SetupError for an option that the command does not read, with the command that does.
    """
    if {"-h", "--help", "--help-all"} & set(words):
        click.echo(help_text(reads, everything="--help-all" in words))
        sys.exit(0)
    words = list(_long_forms(words, dict(reads.short)))
    if refused := [_refusal(reads, path) for path in dict.fromkeys(_given(words)) if not reads.has(path)]:
        raise SetupError("\n".join(refused))
    return load_settings(words)


def _long_forms(words: Sequence[str], short: dict[str, str]) -> Iterator[str]:
    for word in words:
        name, equals, value = word.partition("=")
        path = short.get(path_of(name)) if name.startswith("--") else None
        yield (option_of(path) if path else name) + equals + value


def _given(words: Sequence[str]) -> Iterator[str]:
    """The settings that a command line names; what is none of them is for the parser to refuse."""
    for word in words:
        if word.startswith("--"):
            path = path_of(word.partition("=")[0])
            field = field_of(path)
            if field is not None and group_of(field) is None:
                yield path


def _refusal(reads: Reads, path: str) -> str:
    others = [f"`{other.prog.removesuffix(' KIND')}`" for other in COMMANDS if other is not RENDER and other.has(path)]
    cure = f"{' and '.join(others)} do" if len(others) > 1 else f"{others[0]} does" if others else "leave it out"
    return f"{option_of(path)}: `{reads.prog}` does not read it; {cure}"
