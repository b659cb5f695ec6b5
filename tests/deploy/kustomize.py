"""`kustomize build`, as far as our overlays use it: resources, components and one namespace.

Anything else in a kustomization is an error here, so that this can't pass what kustomize would do otherwise.
"""

from pathlib import Path
from typing import Any

import yaml

_KEYS = {"apiVersion", "kind", "resources", "components", "namespace"}
Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    """All objects of an overlay. Raises ValueError for what is not known here, or where a name is there twice."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - _KEYS:
        raise ValueError(f"{folder}: {', '.join(sorted(unknown))}")
    objects: list[Object] = []
    for name in [*kustomization["resources"], *kustomization.get("components", ())]:
        path = (folder / name).resolve()
        objects += build(path) if path.is_dir() else list(yaml.load_all(path.read_text(), yaml.CSafeLoader))
    if namespace := kustomization.get("namespace"):
        for one in objects:
            one["metadata"]["namespace"] = namespace
    identities = [(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in objects]
    if len(set(identities)) < len(identities):
        raise ValueError(f"{folder}: a name is there twice in {sorted(identities)}")
    return objects
