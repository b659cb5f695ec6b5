"""A Helm chart of the objects that Kustomize gets: what one cluster has otherwise than the next is a value.

The objects are rendered with a mark in the place of each value, and the marks become Helm's expressions. All that
follows from the model, the machines and the times (`serveConfigV2`, resources, grace periods) is as the settings say.
"""

import json
import re
from typing import Any

import yaml

from synthia_vllm import __version__
from synthia_vllm.manifests.common import image
from synthia_vllm.manifests.files import Files, fill, to_yaml
from synthia_vllm.manifests.kubernetes import edge, pod
from synthia_vllm.manifests.kubernetes.pod import Object
from synthia_vllm.manifests.kubernetes.render import render_kubernetes
from synthia_vllm.manifests.sizing import Sizing, size
from synthia_vllm.settings import Settings

_MARK = "helm.mark"
# What the settings have in the place of values: scalars, whose marks stand in the text, and the rest, whose keys do.
_SCALARS = {
    "image": (f"{_MARK}.image:x", ".Values.image"),
    "namespace": ("helm-mark-namespace", ".Release.Namespace"),
    "domain": (f"{_MARK}.domain", ".Values.domain"),
    "prometheus": (f"http://{_MARK}.prometheus:1", ".Values.keda.prometheus"),
}
_OTHERS: dict[str, Any] = {
    "node_selector": {_MARK: "x"},
    "tolerations": [f"{_MARK}:NoSchedule"],
    "runtime_class": _MARK,
    "priority_class": _MARK,
    "pull_secrets": [_MARK],
    "storage_class": _MARK,
    "monitor_labels": {_MARK: "x"},
    "ingress_class": _MARK,
    "parent_gateway": "helm-mark",
}
_VALUE_OF = {
    "nodeSelector": ".Values.nodeSelector",
    "tolerations": ".Values.tolerations",
    "runtimeClassName": ".Values.runtimeClassName",
    "priorityClassName": ".Values.priorityClassName",
    "imagePullSecrets": ".Values.imagePullSecrets",
    "storageClassName": ".Values.model.storageClassName",
    "ingressClassName": ".Values.ingress.className",
    "parentRefs": ".Values.httpRoute.parentRefs",
    "monitoringLabels": ".Values.monitoring.labels",
    "ingressAnnotations": ".Values.ingress.annotations",
}
_MERGED = ("monitoringLabels", "ingressAnnotations")  # with what is there beside them
_EXPRESSIONS = {
    "claim": f'.Values.model.existingClaim | default "{pod.MODEL_CLAIM}"',
    "certificate": ".Values.ingress.tlsSecret",
    "job": 'printf "synthia-model-%s" (include "synthia.modelJob" . | sha256sum | trunc 8)',
}
_PLACES: dict[str, Any] = {
    "nodeSelector": {},
    "tolerations": [],
    "runtimeClassName": "",
    "priorityClassName": "",
    "imagePullSecrets": [],
}
_ONLY_IF = {
    "Ingress": ".Values.ingress.enabled",
    "HTTPRoute": ".Values.httpRoute.enabled",
    "ServiceMonitor": ".Values.monitoring.enabled",
    "PrometheusRule": ".Values.monitoring.enabled",
    "NetworkPolicy": ".Values.networkPolicies.enabled",
    "PersistentVolumeClaim": "not .Values.model.existingClaim",
}
_LINE = re.compile(r"^( *)(\w+): '?@@([\w.]+)@@'?$", re.MULTILINE)


def render_helm(settings: Settings, vllm_options: list[str]) -> Files:
    """Raises SetupError for settings that contradict one another or do not fit what `deploy` says of the machines."""
    sizing = size(settings, several=not settings.deploy.keda)
    marked = settings.model_copy(
        update={
            "deploy": settings.deploy.model_copy(
                update={**{name: mark for name, (mark, _) in _SCALARS.items()}, **_OTHERS}
            )
        }
    )
    files = {
        "helm/Chart.yaml": to_yaml(_chart()),
        "helm/values.yaml": fill("helm-values.yaml.jinja", **_values(settings, sizing)),
        "helm/values.schema.json": json.dumps(_schema(keda=settings.deploy.keda), indent=2) + "\n",
        "helm/templates/NOTES.txt": _notes(settings, sizing),
        "helm/templates/extra-objects.yaml": fill("helm-extra-objects.yaml.jinja"),
    }
    for name, objects in _by_file(render_kubernetes(marked, vllm_options)).items():
        files[f"helm/templates/{name}"] = "---\n".join(_template(one) for one in objects)
    return files


def _values(settings: Settings, sizing: Sizing) -> Object:
    """What the settings say of each value."""
    deploy = settings.deploy
    engines = pod.engine_pods(settings, sizing)
    found = {key: engines.get(key, empty) for key, empty in _PLACES.items()}
    return found | {
        "image": image(settings, sizing.flavour),
        "storageClassName": deploy.storage_class or "",
        "domain": deploy.domain,
        "ingress": deploy.ingress_class is not None,
        "ingressClassName": deploy.ingress_class or "",
        "tlsSecret": edge.CERTIFICATE,
        "route": deploy.parent_gateway is not None,
        "parentRefs": edge.http_route(settings)["spec"]["parentRefs"] if deploy.parent_gateway else [],
        "monitoringLabels": deploy.monitor_labels,
        "keda": deploy.keda,
        "prometheus": deploy.prometheus,
    }


def _schema(*, keda: bool) -> Object:
    """What the values may be, so that a misspelt one is an error of `helm install`."""
    text, switch = {"type": "string"}, {"type": "boolean"}
    texts = {"type": "object", "additionalProperties": text}
    objects = {"type": "array", "items": {"type": "object"}}

    def group(**properties: Object) -> Object:
        return {"type": "object", "additionalProperties": False, "properties": properties}

    values = group(
        image={"type": "string", "minLength": 1},
        imagePullSecrets=objects,
        nodeSelector=texts,
        tolerations=objects,
        runtimeClassName=text,
        priorityClassName=text,
        model=group(existingClaim=text, storageClassName=text),
        domain=text,
        ingress=group(enabled=switch, className=text, tlsSecret=text, annotations=texts),
        httpRoute=group(enabled=switch, parentRefs=objects),
        monitoring=group(enabled=switch, labels=texts),
        dashboards=group(enabled=switch),
        networkPolicies=group(enabled=switch),
        extraObjects=objects,
        **({"keda": group(prometheus=text)} if keda else {}),
    )
    values["properties"]["global"] = {"type": "object"}  # Helm gives it to every chart
    return {"$schema": "http://json-schema.org/draft-07/schema#", **values, "required": ["image"]}


def _notes(settings: Settings, sizing: Sizing) -> str:
    folder = pod.model_folder(settings, sizing) if pod.is_fetched(sizing) else ""
    return fill("helm-notes.txt.jinja", folder=folder, model=sizing.model)


def _by_file(files: Files) -> dict[str, list[Object]]:
    return {
        name.rpartition("/")[2]: list(yaml.safe_load_all(text))
        for name, text in files.items()
        if not name.endswith("kustomization.yaml")
    }


def _template(one: Object) -> str:
    """The object as the text of a template."""
    condition = _ONLY_IF.get(one["kind"])
    if one["kind"] == "ConfigMap" and "grafana_dashboard" in one["metadata"]["labels"]:
        condition = ".Values.dashboards.enabled"
    one["metadata"]["namespace"] = _SCALARS["namespace"][0]
    text = _job(one) if one["kind"] == "Job" else _with_values(one)
    return f"{{{{- if {condition} }}}}\n{text}{{{{- end }}}}\n" if condition else text


def _job(job: Object) -> str:
    """Its template can't be changed: what a value changes in it changes its name."""
    template = _with_values(job["spec"].pop("template"))
    job["metadata"]["name"] = "@@job@@"
    included = '  template: {{- include "synthia.modelJob" . | nindent 4 }}\n'
    return f'{{{{- define "synthia.modelJob" -}}}}\n{template}{{{{- end }}}}\n{_with_values(job)}{included}'


def _with_values(one: Object) -> str:
    _mark(one)
    text = re.sub(r"\{\{|\}\}", lambda found: f'{{{{ "{found[0]}" }}}}', to_yaml(one))
    text = _LINE.sub(_block, text)
    for mark, value in _SCALARS.values():
        text = text.replace(mark, f"{{{{ {value} }}}}")
    return text


def _mark(node: Any) -> None:
    """Puts a mark for the value in the place of all that the settings' marks have become, wherever that is."""
    if isinstance(node, list):
        for item in node:
            _mark(item)
    if not isinstance(node, dict):
        return
    for key, value in list(node.items()):
        if key in _VALUE_OF and re.search("helm.mark", json.dumps(value)):
            node[key] = f"@@{key}@@"
        elif key == "labels" and _MARK in value:
            del value[_MARK]
            value["monitoringLabels"] = "@@monitoringLabels@@"
        elif key == "claimName":
            node[key] = "@@claim@@"
        elif key == "secretName" and value == edge.CERTIFICATE:
            node[key] = "@@certificate@@"
        elif key == "annotations" and any("ingress" in name for name in value):
            value["ingressAnnotations"] = "@@ingressAnnotations@@"
        else:
            _mark(value)


def _block(found: re.Match[str]) -> str:
    indent, key, name = found.groups()
    if name in _EXPRESSIONS:
        return f"{indent}{key}: {{{{ {_EXPRESSIONS[name]} }}}}"
    value, depth = _VALUE_OF[name], len(indent)
    if name.endswith("Name"):
        told = f"{indent}{key}: {{{{ . }}}}"
    elif name in _MERGED:
        told = f"{indent}{{{{- toYaml . | nindent {depth} }}}}"
    else:
        told = f"{indent}{key}:\n{indent}  {{{{- toYaml . | nindent {depth + 2} }}}}"
    return f"{indent}{{{{- with {value} }}}}\n{told}\n{indent}{{{{- end }}}}"


def _chart() -> Object:
    return {
        "apiVersion": "v2",
        "name": "synthia",
        "description": "Synthia-v3.0-11B on vLLM's engine: keys, limits, fair sharing and the bill in front",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
        "kubeVersion": ">=1.29.0-0",
    }
