"""`synthia-vllm bench`: the load benchmark. Each subcommand is a module of `bench`, imported when it runs."""

import click

from synthia_vllm.cli.lazy import LazyGroup

# name: (module, one line of help). A subcommand is its module's `command`.
SUBCOMMANDS = {
    "run": ("synthia_vllm.bench.run", "Load this machine's servers in turn, or one that runs, and write the report."),
    "url": ("synthia_vllm.bench.url", "Sweep any OpenAI-compatible server from one stream to saturation."),
    "slo": ("synthia_vllm.bench.slo", "Find the highest rate at which p99 TTFT and p99 ITL hold."),
    "ceiling": ("synthia_vllm.bench.ceiling", "Find what the serving layer can do with no inference in the way."),
    "chaos": ("synthia_vllm.bench.chaos", "Kill replicas under load and tell what clients saw."),
    "report": ("synthia_vllm.bench.report", "Write the report of a run anew."),
    "compare": ("synthia_vllm.bench.compare", "Hold a run against an older one; fails where it is worse."),
    "size": ("synthia_vllm.bench.sizing.command", "Find how many replicas a load needs, by simulation."),
}
# In a wheel, an image or a checkout without the benchmark's own packages.
CURE = 'install synthia-vllm[bench]; in a checkout of the repository `make bench` does, and takes ARGS="more options"'


@click.group("bench", cls=LazyGroup, lazy=SUBCOMMANDS, cure=CURE)
def command() -> None:
    """Measure how fast it is, against whom, and where it breaks. `synthia-vllm bench run` is where to start."""
