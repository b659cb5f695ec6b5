"""What all kinds of files have in common: the image's name, and settings as a process there reads them."""

import math
from typing import Any

from synthia_vllm import __version__
from synthia_vllm.manifests.files import Files, shipped
from synthia_vllm.settings import Settings, dump

_RUNBOOK = "docs/runbook.md"  # as the rules have it
_OF_RENDERING = ("config", "deploy")
OF_RAY = ("cluster", "scaling")  # what is read where Ray runs
OF_SEVERAL = (*OF_RAY, "replicas")  # and where there are several replicas; of no use to `serve`


def image(settings: Settings, flavour: str) -> str:
    """As named, with the version and what it is for as its tag where no tag or digest is given."""
    named = settings.deploy.image
    last = named.rpartition("/")[2]
    return named if ":" in last or "@" in last else f"{named}:{__version__}-{flavour}"


def in_cluster(settings: Settings, *, model: str, gpus: int) -> Settings:
    """The settings as they hold on the nodes: engines wait for those that are meant, none of which may be up yet."""
    told = settings.model_copy(update={"model": model, "host": "0.0.0.0"}, deep=True)
    if told.cluster.accelerator == "auto":
        told.cluster = told.cluster.model_copy(update={"accelerator": "gpu" if gpus else "cpu"})
    return told


def longest_silence_s(settings: Settings) -> int:
    """Seconds: the gateway writes something at least so often, or ends the request itself."""
    return math.ceil(max(settings.timeouts.upstream_read, settings.fair.max_wait_s, settings.replicas.start_wait_s))


def rules(settings: Settings) -> Files:
    """The rules of `deploy/prometheus`, whose alerts link to the runbook where people can reach it."""
    runbook = settings.deploy.runbook or _RUNBOOK
    return {
        name: text.replace(f"runbook_url: {_RUNBOOK}#", f"runbook_url: {runbook}#")
        for name, text in shipped("prometheus/rules").items()
    }


def settings_file(settings: Settings, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings that differ from the defaults, less the secrets, what is for rendering, and the groups named."""
    return dump(settings, exclude={*_OF_RENDERING, *without})
