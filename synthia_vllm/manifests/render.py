"""The kinds of files that `synthia-vllm deploy render` writes."""

from collections.abc import Callable

from synthia_vllm.gateway.edge.listener import check_exposure
from synthia_vllm.manifests.compose import render_compose
from synthia_vllm.manifests.files import Files
from synthia_vllm.manifests.helm import render_helm
from synthia_vllm.manifests.kubernetes.render import render_kubernetes
from synthia_vllm.manifests.launcher import render_launcher
from synthia_vllm.manifests.systemd import render_systemd
from synthia_vllm.settings import Settings

_RENDERERS: dict[str, Callable[[Settings, list[str]], Files]] = {
    "compose": render_compose,
    "helm": render_helm,
    "k8s": render_kubernetes,
    "ray": render_launcher,
    "systemd": render_systemd,
}


def render(kind: str, settings: Settings, vllm_options: list[str]) -> Files:
    """Paths below the target folder and their texts.

    Raises SetupError where the settings contradict one another, or others could use the server without a key.
    """
    check_exposure(settings)
    return _RENDERERS[kind](settings, vllm_options)
