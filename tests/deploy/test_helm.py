"""The chart, by Helm itself: what it gives is what Kustomize gives for the same settings."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.generate import FOLDER
from synthia_vllm.manifests.files import write
from synthia_vllm.manifests.render import render
from synthia_vllm.settings import Settings, load_settings
from tests.deploy.helm import Helm
from tests.deploy.kustomize import build

CHART = FOLDER / "helm"
PRESETS = sorted(path.stem for path in (FOLDER / "kubernetes" / "presets").iterdir())
Object = dict[str, Any]
Key = tuple[str, str]


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"))


def by_name(objects: list[Object]) -> dict[Key, Object]:
    """A Job's name is a sum of its template's text, which the two write differently; the rest of it is compared."""
    found = {}
    for one in copy.deepcopy(objects):
        if one["kind"] == "Job":
            assert re.fullmatch(r"synthia-model-[0-9a-f]{8}", one["metadata"]["name"])
            one["metadata"]["name"] = "synthia-model"
        found[one["kind"], one["metadata"]["name"]] = one
    assert len(found) == len(objects)
    return found


def of_kustomize(settings: Settings, folder: Path) -> dict[Key, Object]:
    write(render("k8s", settings, []), folder)
    return by_name(build(folder / "kubernetes" / "overlays" / settings.deploy.name))


def preset(name: str, *words: str) -> Settings:
    return load_settings(["--config", str(FOLDER / "kubernetes" / "presets" / f"{name}.yaml"), *words])


def test_the_committed_chart_has_no_faults(helm: Helm) -> None:
    done = helm.run("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_it_gives_what_kustomize_gives(helm: Helm, name: str, tmp_path: Path) -> None:
    settings = preset(name)
    write(render("helm", settings, []), tmp_path)
    assert by_name(helm.template(tmp_path / "helm")) == of_kustomize(settings, tmp_path)


_WORDS = {
    "image": "registry.example.com/synthia@sha256:" + "0" * 64,
    "domain": "chat.example.com",
    "node-selector": "pool=l40s",
    "tolerations": "spot:NoExecute",
    "runtime-class": "nvidia",
    "priority-class": "serving",
    "pull-secrets": "registry",
    "storage-class": "efs",
    "monitor-labels": "release=stack",
    "ingress-class": "nginx",
    "parent-gateway": "edge/public",
}
_VALUES = {
    "image": _WORDS["image"],
    "domain": "chat.example.com",
    "nodeSelector": {"pool": "l40s"},
    "tolerations": [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ],
    "runtimeClassName": "nvidia",
    "priorityClassName": "serving",
    "imagePullSecrets": [{"name": "registry"}],
    "model": {"storageClassName": "efs"},
    "monitoring": {"labels": {"release": "stack"}},
    "ingress": {"enabled": True, "className": "nginx"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public", "namespace": "edge"}]},
}


@pytest.mark.parametrize("name", ["single-gpu", "keda"])
def test_a_value_does_what_the_setting_does(helm: Helm, name: str, tmp_path: Path) -> None:
    plain = preset(name)
    told = preset(name, *(word for option, value in _WORDS.items() for word in (f"--deploy.{option}", value)))
    wanted = of_kustomize(told, tmp_path)
    write(render("helm", plain, []), tmp_path)
    assert by_name(helm.template(tmp_path / "helm", _VALUES)) == wanted
    # And the settings' own are the values of their chart.
    write(render("helm", told, []), tmp_path / "told")
    assert by_name(helm.template(tmp_path / "told" / "helm")) == wanted


def test_what_a_value_changes_in_the_job_is_another_job(helm: Helm) -> None:
    def name(**values: Any) -> str:
        (job,) = [one for one in helm.template(CHART, values) if one["kind"] == "Job"]
        return str(job["metadata"]["name"])

    plain = name()
    assert name() == plain == name(domain="other.example.com"), "nothing of the job's"
    others = [name(image="other:1"), name(priorityClassName="x"), name(model={"existingClaim": "mine"})]
    assert len({plain, *others}) == 4


def test_a_claim_of_ones_own_takes_the_place_of_the_charts(helm: Helm) -> None:
    objects = helm.template(CHART, {"model": {"existingClaim": "weights"}})
    assert not [one for one in objects if one["kind"] == "PersistentVolumeClaim"]
    assert set(re.findall(r'"claimName": "([^"]+)"', json.dumps(objects))) == {"weights"}


def test_what_is_not_wanted_is_left_out(helm: Helm) -> None:
    off = {name: {"enabled": False} for name in ("monitoring", "dashboards", "networkPolicies")}
    kinds = {one["kind"] for one in helm.template(CHART, off)}
    assert not kinds & {"ServiceMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy", "Ingress", "HTTPRoute"}
    assert {"RayService", "Service", "PodDisruptionBudget", "ServiceAccount"} <= kinds


def test_objects_of_ones_own_come_along_with_expressions(helm: Helm) -> None:
    mine = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-mine"}}
    both = [mine, mine | {"kind": "Secret"}]
    found = by_name(helm.template(CHART, {"extraObjects": both}))
    assert {("ConfigMap", "synthia-mine"), ("Secret", "synthia-mine")} <= found.keys()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"imagee": "x"}, "imagee"),
        ({"image": ""}, "image"),
        ({"ingress": {"enable": True}}, "enable"),
        ({"nodeSelector": {"pool": 7}}, "pool"),
        ({"keda": {"prometheus": "http://x"}}, "keda"),
    ],
)
def test_a_value_that_is_none_is_refused_by_name(helm: Helm, values: Object, named: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm.run("template", "synthia", str(CHART), "--values", str(tmp_path / "values.yaml"))
    assert done.returncode != 0
    assert named in done.stderr


def test_the_api_takes_what_values_bring(helm: Helm) -> None:
    for one in helm.template(CHART, _VALUES):
        if one["apiVersion"] in ("v1", "batch/v1", "networking.k8s.io/v1", "policy/v1"):
            kubernetes_validate.validate(one, "1.34", strict=True)


def test_the_notes_say_where_clients_go(helm: Helm) -> None:
    words = ["install", "synthia", str(CHART), "--namespace", "synthia", "--dry-run=client", "--set"]
    assert "the Service synthia-gateway" in helm.run(*words, "ingress.enabled=false").stdout
    assert "https://synthia.example.com/v1" in helm.run(*words, "ingress.enabled=true").stdout
