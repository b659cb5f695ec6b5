"""The tree of files: `base`, `components`, and the overlay that is for these settings."""

from synthia_vllm.manifests.files import Files, to_yaml
from synthia_vllm.manifests.kubernetes import base, edge, pod, rayservice, server
from synthia_vllm.manifests.kubernetes.pod import Object
from synthia_vllm.manifests.sizing import Sizing, size
from synthia_vllm.settings import Settings

_KUSTOMIZE = "kustomize.config.k8s.io"


def render_kubernetes(settings: Settings, vllm_options: list[str]) -> Files:
    """Raises SetupError for settings that contradict one another or do not fit what `deploy` says of the machines."""
    keda = settings.deploy.keda
    sizing = size(settings, several=not keda)
    overlay = f"kubernetes/overlays/{settings.deploy.name}"
    scrape = "scrape-pods" if keda else "scrape"
    files = {
        **_folder("kubernetes/base", _base(settings)),
        **_folder("kubernetes/components/monitoring", _monitoring(settings), component=True),
        **_folder(f"kubernetes/components/{scrape}", _scrape(settings), component=True),
        **_folder(overlay, _servers(settings, sizing, vllm_options)),
    }
    components = ["../../components/monitoring", f"../../components/{scrape}"]
    if settings.deploy.ingress_class:
        files[f"{overlay}/ingress.yaml"] = to_yaml(edge.ingress(settings))
    if settings.deploy.parent_gateway:
        files[f"{overlay}/http-route.yaml"] = to_yaml(edge.http_route(settings))
    if pod.is_fetched(sizing):
        documents = base.model_volume(settings, sizing), base.model_job(settings, sizing)
        files |= {f"{overlay}/model.yaml": to_yaml(*documents)}
    own = sorted(name.rpartition("/")[2] for name in files if name.startswith(f"{overlay}/"))
    kustomization = {
        "apiVersion": f"{_KUSTOMIZE}/v1beta1",
        "kind": "Kustomization",
        "namespace": settings.deploy.namespace,
        "resources": ["../../base", *(name for name in own if name != "kustomization.yaml")],
        "components": components,
    }
    return files | {f"{overlay}/kustomization.yaml": to_yaml(kustomization)}


def _base(settings: Settings) -> dict[str, list[Object]]:
    return {
        "service-account.yaml": [base.service_account()],
        "gateway.yaml": [base.gateway_service(settings)],
        "network-policies.yaml": base.network_policies(settings),
    }


def _monitoring(settings: Settings) -> dict[str, list[Object]]:
    return {
        "prometheus-rule.yaml": [base.prometheus_rule(settings)],
        "dashboards.yaml": base.dashboards(),
    }


def _scrape(settings: Settings) -> dict[str, list[Object]]:
    return {"service-monitor.yaml": [base.service_monitor(settings)]}


def _servers(settings: Settings, sizing: Sizing, vllm_options: list[str]) -> dict[str, list[Object]]:
    metrics = {"metrics.yaml": [base.metrics_service(settings)]}
    if settings.deploy.keda:
        return metrics | {
            "admin.yaml": [base.admin_policy(settings)],
            "config.yaml": [server.config_map(settings, sizing)],
            "server.yaml": [server.deployment(settings, sizing, vllm_options)],
            "scaled-object.yaml": [server.scaled_object(settings)],
            "disruption-budgets.yaml": [base.disruption_budget("engine", {"maxUnavailable": 1})],
        }
    return metrics | {
        "rayservice.yaml": [rayservice.ray_service(settings, sizing, vllm_options)],
        "disruption-budgets.yaml": rayservice.disruption_budgets(settings),
    }


def _folder(folder: str, objects: dict[str, list[Object]], *, component: bool = False) -> Files:
    kind, version = ("Component", "v1alpha1") if component else ("Kustomization", "v1beta1")
    kustomization = {"apiVersion": f"{_KUSTOMIZE}/{version}", "kind": kind, "resources": sorted(objects)}
    files = {f"{folder}/{name}": to_yaml(*documents) for name, documents in objects.items()}
    return files | {f"{folder}/kustomization.yaml": to_yaml(kustomization)}
