"""What clients come through, where the cluster has something for it: an Ingress, or a route of the Gateway API."""

from synthia_vllm.manifests.common import longest_silence_s
from synthia_vllm.manifests.kubernetes import pod
from synthia_vllm.manifests.kubernetes.base import SERVICE
from synthia_vllm.manifests.kubernetes.pod import Object
from synthia_vllm.settings import Settings

_PORT = 80  # of the Service
CERTIFICATE = "synthia-tls"
# What clients use. Keys and metrics (/admin, /metrics, /sd) are for the operator's own network.
_PREFIXES = ("/v1",)
_EXACT = ("/", "/health", "/ready", "/tokenize", "/detokenize")


def ingress(settings: Settings) -> Object:
    """An Ingress for `deploy.domain`; its annotations are those of ingress-nginx, which others overlook.

    A reply passes chunk by chunk, may be silent for as long as the gateway allows, and is never asked for twice: what
    nginx does otherwise (deploy/proxy).
    """
    silence = str(longest_silence_s(settings))
    annotations = {
        "proxy-buffering": "off",
        "proxy-request-buffering": "off",
        "proxy-body-size": str(settings.max_body_bytes),
        "proxy-read-timeout": silence,
        "proxy-send-timeout": silence,
        "proxy-next-upstream": "off",
    }
    backend = {"service": {"name": SERVICE, "port": {"number": _PORT}}}
    paths = [*((path, "Prefix") for path in _PREFIXES), *((path, "Exact") for path in _EXACT)]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": pod.meta(pod.NAME, "gateway")
        | {"annotations": {f"nginx.ingress.kubernetes.io/{name}": value for name, value in annotations.items()}},
        "spec": {
            "ingressClassName": settings.deploy.ingress_class,
            "tls": [{"hosts": [settings.deploy.domain], "secretName": CERTIFICATE}],
            "rules": [
                {
                    "host": settings.deploy.domain,
                    "http": {
                        "paths": [{"path": path, "pathType": kind, "backend": backend} for path, kind in paths],
                    },
                }
            ],
        },
    }


def http_route(settings: Settings) -> Object:
    """A route of the Gateway API below the Gateway that `deploy.parent_gateway` names; TLS is that one's."""
    namespace, _, name = (settings.deploy.parent_gateway or "").rpartition("/")
    matches = [
        *({"path": {"type": "PathPrefix", "value": path}} for path in _PREFIXES),
        *({"path": {"type": "Exact", "value": path}} for path in _EXACT),
    ]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": pod.meta(pod.NAME, "gateway"),
        "spec": {
            "parentRefs": [{"name": name, **({"namespace": namespace} if namespace else {})}],
            "hostnames": [settings.deploy.domain],
            "rules": [
                {
                    "matches": matches,
                    # No limit: a reply takes as long as it takes, and the gateway has limits of its own.
                    "timeouts": {"request": "0s"},
                    "backendRefs": [{"name": SERVICE, "port": _PORT}],
                }
            ],
        },
    }
