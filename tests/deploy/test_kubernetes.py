"""The Kubernetes overlays against the API's schemas, KubeRay's and the operators' own."""

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from pydantic import ValidationError

from deploy.generate import FOLDER
from synthia_vllm.cli.cluster import config_text
from synthia_vllm.errors import SetupError
from synthia_vllm.manifests.kubernetes.rayservice import in_pod
from synthia_vllm.manifests.render import render
from synthia_vllm.manifests.sizing import size
from synthia_vllm.settings import DeploySettings, Settings, load_settings
from tests.deploy.kustomize import build
from tests.deploy.rayservice import RayServiceSpec

_VERSION = "1.34"
OVERLAYS = sorted(path.name for path in (FOLDER / "kubernetes" / "overlays").iterdir())
RAY = [name for name in OVERLAYS if name != "keda"]
_CUSTOM: dict[str, Any] = {
    "ServiceMonitor": ServiceMonitor,
    "PrometheusRule": PrometheusRule,
    "ScaledObject": ScaledObject,
}
Object = dict[str, Any]
COMPONENT = "app.kubernetes.io/component"


@functools.cache
def objects(overlay: str) -> list[Object]:
    """Read once: they are not to be changed."""
    return build(FOLDER / "kubernetes" / "overlays" / overlay)


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [one for one in objects(overlay) if one["kind"] == kind]


def ray_service(overlay: str) -> Object:
    (found,) = of_kind(overlay, "RayService")
    return found


def templates(overlay: str) -> list[Object]:
    """The pod templates of servers."""
    if overlay == "keda":
        return [one["spec"]["template"] for one in of_kind(overlay, "Deployment")]
    cluster = ray_service(overlay)["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    words = [kubectl, "kustomize", str(FOLDER / "kubernetes" / "overlays" / overlay)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "unknown field" in done.stderr:
        pytest.skip("a kubectl too old for components")
    assert done.returncode == 0, done.stderr

    def key(one: Object) -> tuple[str, str]:
        return one["kind"], one["metadata"]["name"]

    assert sorted(yaml.safe_load_all(done.stdout), key=key) == sorted(objects(overlay), key=key)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_takes_every_object(overlay: str) -> None:
    for one in copy.deepcopy(objects(overlay)):
        if one["kind"] in _CUSTOM:
            model = _CUSTOM[one["kind"]].model_validate(one)
            # These models let unknown fields fall: what is not there again was none. KEDA has this one since 2.17.
            one["spec"].get("fallback", {}).pop("behavior", None)
            assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == one
        elif one["kind"] == "RayService":
            RayServiceSpec.model_validate(one["spec"])
        else:
            kubernetes_validate.validate(one, _VERSION, strict=True)
    for template in templates(overlay):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(wrapped, _VERSION, strict=True)


def test_every_preset_has_its_overlay() -> None:
    assert [path.stem for path in sorted((FOLDER / "kubernetes" / "presets").iterdir())] == OVERLAYS
    assert {"demo-cpu", "single-gpu", "multi-node-tp"} <= set(OVERLAYS)


@pytest.mark.parametrize("overlay", RAY)
def test_the_serve_config_is_what_cluster_config_prints(overlay: str) -> None:
    settings = load_settings(["--config", str(FOLDER / "kubernetes" / "presets" / f"{overlay}.yaml")])
    printed = config_text(in_pod(settings, size(settings)), [])
    assert yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"]) == yaml.safe_load(printed)


@pytest.mark.parametrize("overlay", RAY)
def test_engines_are_planned_for_the_nodes_that_are_meant(overlay: str) -> None:
    """KubeRay deploys once the head is up, which may be before any other node."""
    config = yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])
    (engine,) = [one for one in config["applications"] if one["name"] == "engine"]
    meant = "cpu" if overlay == "demo-cpu" else "gpu"
    assert engine["args"]["settings"]["cluster"]["accelerator"] == meant


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_rights_and_no_secrets_in_their_environment(overlay: str) -> None:
    for template in templates(overlay):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert not {variable["name"] for variable in container["env"]} & {
                "SYNTHIA_ACCESS__SECRET",
                "SYNTHIA_ACCESS__DATABASE",
            }
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert mounts["/run/secrets/synthia"]["readOnly"] is True
            assert {mount["name"] for mount in mounts.values()} <= {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_servers_are_given_as_long_to_end_as_draining_takes(overlay: str) -> None:
    settings = load_settings(["--config", str(FOLDER / "kubernetes" / "presets" / f"{overlay}.yaml")])
    drain = settings.drain_timeout if overlay == "keda" else settings.cluster.drain_s
    for template in templates(overlay):
        assert template["spec"]["terminationGracePeriodSeconds"] > drain


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_and_budgets_select_pods_that_exist(overlay: str) -> None:
    pods = [template["metadata"]["labels"] for template in templates(overlay)]
    selectors = [one["spec"]["selector"] for one in of_kind(overlay, "Service")]
    selectors += [one["spec"]["podSelector"]["matchLabels"] for one in of_kind(overlay, "NetworkPolicy")]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods), selector


def evictions_allowed(budget: Object, owner: str, pods: int) -> int:
    """Pods that may be evicted while all of them are healthy, as Kubernetes' disruption controller has it.

    `getExpectedPodCount` and `updatePdbStatus` (kubernetes/pkg/controller/disruption/disruption.go, 1.34): a
    `maxUnavailable` is of the number that the owner's `/scale` tells; without one the sync fails, and none is allowed.
    """
    spec = budget["spec"]
    if "maxUnavailable" in spec:
        scales = owner in ("Deployment", "ReplicaSet", "StatefulSet", "ReplicationController")
        healthy = pods - spec["maxUnavailable"] if scales else pods
    else:
        healthy = spec["minAvailable"]
    return max(pods - healthy, 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_node_of_engines_can_be_drained(overlay: str) -> None:
    budgets = {one["metadata"]["labels"][COMPONENT]: one for one in of_kind(overlay, "PodDisruptionBudget")}
    if overlay == "keda":
        assert evictions_allowed(budgets["engine"], "Deployment", 4) == 1
        return
    (workers,) = ray_service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert evictions_allowed(budgets["engine"], "RayCluster", workers["minReplicas"]) == 1, "and one at a time"
    assert evictions_allowed(budgets["head"], "RayCluster", 1) == 0, "it takes the cluster along"


def test_a_head_that_comes_back_to_its_cluster_may_be_evicted() -> None:
    settings = load_settings(["--config", str(FOLDER / "kubernetes" / "presets" / "multi-node-tp.yaml")])
    settings.deploy.gcs_redis = "redis:6379"
    (text,) = [text for path, text in render("k8s", settings, []).items() if path.endswith("/disruption-budgets.yaml")]
    assert [one["metadata"]["name"] for one in yaml.safe_load_all(text)] == ["synthia-engine"]


def test_what_scales_without_ray_is_left_as_it_is_while_prometheus_is_gone() -> None:
    (scaled,) = of_kind("keda", "ScaledObject")
    assert scaled["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
    policy = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert policy["stabilizationWindowSeconds"] == 300


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_calls_its_job_what_the_rules_call_it(overlay: str) -> None:
    (monitor,) = of_kind(overlay, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    scraped = [one for one in of_kind(overlay, "Service") if wanted <= one["metadata"]["labels"].items()]
    assert [one["metadata"]["labels"][monitor["spec"]["jobLabel"]] for one in scraped] == ["synthia"]
    (rules,) = of_kind(overlay, "PrometheusRule")
    jobs = set(re.findall(r'job="([^"]+)"', yaml.dump(rules)))
    assert jobs == {"synthia"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_gateways_port_is_open_to_all(overlay: str) -> None:
    open_to_all = [
        port["port"]
        for policy in of_kind(overlay, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", ())
        if "from" not in rule
        for port in rule["ports"]
    ]
    assert open_to_all == [8000]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_reaches_its_own_names_and_what_the_settings_name(overlay: str) -> None:
    (policy,) = [one for one in of_kind(overlay, "NetworkPolicy") if one["spec"]["policyTypes"] == ["Egress"]]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "synthia"}
    mine, names, others = policy["spec"]["egress"]
    assert mine == {"to": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "synthia"}}}]}
    assert names == {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
    assert {port["port"] for port in others["ports"]} == set(DeploySettings().egress_ports)


def test_a_pod_without_ports_outside_reaches_nobody_else() -> None:
    policies = rendered("network-policies", deploy={"egress_ports": []})
    (egress,) = [one["spec"]["egress"] for one in policies if one["metadata"]["name"] == "synthia-egress"]
    assert len(egress) == 2, "a rule without ports would allow all of them"


def test_gateways_are_on_pods_that_drain() -> None:
    """Ray labels its nodes by KubeRay's groups; where engines may all be gone, the head is the one that is left."""

    def nodes(**groups: Any) -> Any:
        (ray,) = rendered("rayservice", **groups)
        (group,) = ray["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_NODE_TYPE_NAME", "value": group["groupName"]} in container["env"]
        assert "preStop" in container["lifecycle"]
        applications = yaml.safe_load(ray["spec"]["serveConfigV2"])["applications"]
        (gateway,) = [one for one in applications if one["name"] == "gateway"]
        return gateway["args"]["settings"].get("cluster", {}).get("gateway_nodes")

    assert nodes() == nodes(scaling={"max_replicas": 2}) == {"ray.io/node-group": "engines"}
    assert nodes(scaling={"min_replicas": 0, "max_replicas": 2}) is None
    assert nodes(cluster={"gateway_nodes": {"pool": "front"}}) == {"pool": "front"}


def test_other_settings_roll_the_pods_that_read_them() -> None:
    def annotations(**groups: Any) -> Any:
        (server,) = rendered("server", **{"deploy": {"keda": True}, **groups})
        return server["spec"]["template"]["metadata"]["annotations"]

    assert annotations() == annotations()
    assert annotations() != annotations(fair={"max_wait_s": 7})


def test_keys_and_metrics_of_a_pod_without_ray_have_a_port_that_clients_do_not_reach() -> None:
    (config,) = [one for one in of_kind("keda", "ConfigMap") if "settings.yaml" in one["data"]]
    told = Settings.model_validate(yaml.safe_load(config["data"]["settings.yaml"]))
    services = {one["metadata"]["name"]: one["spec"]["ports"][0]["targetPort"] for one in of_kind("keda", "Service")}
    assert services == {"synthia-gateway": told.port, "synthia-metrics": told.admin_port}
    assert told.admin_port not in (None, told.port)
    (container,) = of_kind("keda", "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    assert {port["containerPort"] for port in container["ports"]} == {told.port, told.admin_port}
    (rule,) = [
        rule
        for policy in of_kind("keda", "NetworkPolicy")
        for rule in policy["spec"].get("ingress", ())
        if told.admin_port in [port["port"] for port in rule.get("ports", ())]
    ]
    assert rule["from"] == [{"namespaceSelector": {}}], "pods of the cluster, and no address outside of it"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_series_say_which_pod_they_are_of_where_nobody_else_does(overlay: str) -> None:
    (monitor,) = of_kind(overlay, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    by_pod = [one for one in endpoint.get("relabelings", ()) if one["targetLabel"] == "replica"]
    assert [one["sourceLabels"] for one in by_pod] == ([["__meta_kubernetes_pod_name"]] if overlay == "keda" else [])


def test_an_ingress_takes_what_clients_use_and_no_keys_or_metrics() -> None:
    settings = {"ingress_class": "nginx", "domain": "chat.example.com"}
    (ingress,) = rendered("ingress", deploy=settings, timeouts={"upstream_read": 700})
    kubernetes_validate.validate(copy.deepcopy(ingress), _VERSION, strict=True)
    ((service,), (rule,)) = rendered("gateway", deploy=settings), ingress["spec"]["rules"]
    assert rule["host"] == "chat.example.com"
    assert ingress["spec"]["tls"] == [{"hosts": ["chat.example.com"], "secretName": "synthia-tls"}]
    paths = rule["http"]["paths"]
    assert {path["backend"]["service"]["name"] for path in paths} == {service["metadata"]["name"]}
    assert {path["backend"]["service"]["port"]["number"] for path in paths} == {service["spec"]["ports"][0]["port"]}

    def taken(path: str) -> bool:
        return any(
            path == one["path"] or (one["pathType"] == "Prefix" and path.startswith(one["path"] + "/")) for one in paths
        )

    _only_clients_routes(taken)
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "700"
    assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == str(Settings().max_body_bytes)


def test_a_route_of_the_gateway_api_does_the_same() -> None:
    (route,) = rendered("http-route", deploy={"parent_gateway": "edge/public", "domain": "chat.example.com"})
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "edge"}]
    assert route["spec"]["hostnames"] == ["chat.example.com"]
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}, "some have a limit of 15 s where none is named"
    assert rule["backendRefs"] == [{"name": "synthia-gateway", "port": 80}]
    paths = [match["path"] for match in rule["matches"]]
    assert len(paths) <= 64, "the API takes no more"

    def taken(path: str) -> bool:
        return any(
            path == one["value"] or (one["type"] == "PathPrefix" and path.startswith(one["value"] + "/"))
            for one in paths
        )

    _only_clients_routes(taken)
    (route,) = rendered("http-route", deploy={"parent_gateway": "public"})
    assert route["spec"]["parentRefs"] == [{"name": "public"}]


def _only_clients_routes(taken: Callable[[str], bool]) -> None:
    clients = ["/v1/chat/completions", "/v1/models", "/v1/messages/count_tokens", "/tokenize", "/ready", "/"]
    operators = ["/admin/keys", "/admin/live", "/metrics", "/sd", "/inference/v1/generate", "/inference/v1/abort"]
    assert [path for path in clients if not taken(path)] == []
    assert [path for path in operators if taken(path)] == []


def rendered(name: str, **groups: Any) -> list[Object]:
    files = render("k8s", Settings(model="demo", **groups), [])
    (text,) = [text for path, text in files.items() if path.endswith(f"/{name}.yaml") and "monitoring" not in path]
    return list(yaml.safe_load_all(text))


def takes_clients(**scaling: Any) -> list[str]:
    """The components whose pods the gateway's Service sends clients to."""
    ((service,), (ray,)) = (rendered(name, scaling=scaling) for name in ("gateway", "rayservice"))
    groups = ray["spec"]["rayClusterConfig"]
    pods = [one["template"]["metadata"]["labels"] for one in [groups["headGroupSpec"], *groups["workerGroupSpecs"]]]
    selected = [labels for labels in pods if service["spec"]["selector"].items() <= labels.items()]
    return [labels["app.kubernetes.io/component"] for labels in selected]


def test_where_no_worker_may_be_left_clients_reach_the_head() -> None:
    """It is ready whenever Ray is; its HAProxy reaches a gateway, whose queue wakes an engine."""
    assert takes_clients(min_replicas=0, max_replicas=2) == ["head", "engine"]
    assert takes_clients(max_replicas=2) == takes_clients() == ["engine"]


def test_a_head_that_is_lost_finds_its_cluster_again_where_redis_is_given() -> None:
    (ray,) = rendered("rayservice", deploy={"gcs_redis": "redis.data:6379"})
    RayServiceSpec.model_validate(ray["spec"])
    options = ray["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis.data:6379"
    reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": "synthia-secrets", "key": "gcs_redis", "optional": True}
    (without,) = rendered("rayservice")
    assert "gcsFaultToleranceOptions" not in without["spec"]["rayClusterConfig"]


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "demo-cpu"])
def test_the_job_fills_the_folder_that_the_servers_read(overlay: str) -> None:
    (job,) = of_kind(overlay, "Job")
    told = (
        next(one["data"]["settings.yaml"] for one in of_kind(overlay, "ConfigMap") if "settings.yaml" in one["data"])
        if overlay == "keda"
        else ray_service(overlay)["spec"]["serveConfigV2"]
    )
    assert f"model: {fetched_to(job)}\n" in told


def fetched_to(job: Object) -> str:
    (fetch,) = job["spec"]["template"]["spec"]["containers"]
    folder: str = fetch["command"][fetch["command"].index("--to") + 1]
    return folder


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "demo-cpu"])
def test_no_server_starts_before_the_job_is_through(overlay: str) -> None:
    """Ray's head neither: KubeRay submits the Serve config once it is ready, and that reads the model."""
    (job,) = of_kind(overlay, "Job")
    for template in templates(overlay):
        (wait,) = template["spec"]["initContainers"]
        assert wait["command"] == ["synthia-vllm", "deploy", "await-model", fetched_to(job)]
        assert "/models" in {mount["mountPath"] for mount in wait["volumeMounts"]}


def job_of(**deploy: Any) -> Object:
    settings = load_settings(["--config", str(FOLDER / "kubernetes" / "presets" / "single-gpu.yaml")])
    for name, value in deploy.items():
        setattr(settings.deploy, name, value)
    (text,) = [text for path, text in render("k8s", settings, []).items() if path.endswith("/model.yaml")]
    (found,) = [one for one in yaml.safe_load_all(text) if one["kind"] == "Job"]
    return found


def test_another_image_or_model_is_another_job() -> None:
    """The API refuses a changed template of one that is there."""
    kinds: list[Object] = [{}, {"image": "other"}, {"model_revision": "a" * 40}, {"model_revision": "b" * 40}]
    jobs = [job_of(**kind) for kind in kinds]
    assert len({one["metadata"]["name"] for one in jobs}) == len(jobs)
    assert job_of(domain="other.example") == jobs[0]
    assert all(one["spec"]["ttlSecondsAfterFinished"] > 0 for one in jobs)
    folders = list(map(fetched_to, jobs))
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3, "another commit is fetched beside the one that is served"


PLACED: dict[str, Any] = {
    "node_selector": {"pool": "l40s"},
    "tolerations": ["team=chat:NoSchedule", "spot:PreferNoSchedule"],
    "runtime_class": "nvidia",
    "priority_class": "serving",
    "pull_secrets": ["registry"],
}


@pytest.mark.parametrize("keda", [False, True])
def test_pods_go_where_the_settings_say(keda: bool) -> None:
    (found,) = rendered("server" if keda else "rayservice", deploy={**PLACED, "keda": keda, "gpus_per_node": 1})
    if keda:
        engine, others = found["spec"]["template"]["spec"], []
    else:
        groups = found["spec"]["rayClusterConfig"]
        engine, *others = (one["template"]["spec"] for one in (*groups["workerGroupSpecs"], groups["headGroupSpec"]))
    assert engine["nodeSelector"] == {"pool": "l40s"}
    assert engine["runtimeClassName"] == "nvidia"
    assert engine["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "chat", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "PreferNoSchedule"},
    ]
    for spec in (engine, *others):
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert spec["priorityClassName"] == "serving"
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": {"spec": spec}}
        kubernetes_validate.validate(wrapped, _VERSION, strict=True)
    for spec in others:
        assert not {"nodeSelector", "tolerations", "runtimeClassName"} & spec.keys(), "it needs none of their nodes"


@pytest.mark.parametrize("taint", ["", "key", "key=value", ":NoSchedule", "a b:NoSchedule", "key:Never"])
def test_a_toleration_is_a_taint_as_kubectl_writes_it(taint: str) -> None:
    with pytest.raises(ValidationError, match="tolerations"):
        Settings(model="demo", deploy={"tolerations": [taint]})


def test_a_pod_asks_for_no_more_than_its_node_leaves() -> None:
    (found,) = rendered("rayservice", deploy={"cpus_per_node": 8, "reserved_cpus": 0.75})
    (group,) = found["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == container["resources"]["limits"]["cpu"] == "7250m"
    with pytest.raises(SetupError, match="reserved-cpus 4 does not fit --deploy"):
        rendered("rayservice", deploy={"cpus_per_node": 4, "reserved_cpus": 4})


def test_what_others_have_named_is_asked_for_by_name() -> None:
    words = ["--config", str(FOLDER / "kubernetes" / "presets" / "keda.yaml")]
    words += ["--deploy.monitor-labels", "release=stack", "--deploy.prometheus", "http://thanos.obs:10902"]
    words += ["--deploy.storage-class", "efs"]
    found = [one for text in render("k8s", load_settings(words), []).values() for one in yaml.safe_load_all(text)]
    kinds = {one["kind"]: one for one in found}
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert kinds[kind]["metadata"]["labels"]["release"] == "stack"
        assert kinds[kind]["metadata"]["labels"]["app.kubernetes.io/name"] == "synthia"
    (trigger,) = kinds["ScaledObject"]["spec"]["triggers"]
    assert trigger["metadata"]["serverAddress"] == "http://thanos.obs:10902"
    assert kinds["PersistentVolumeClaim"]["spec"]["storageClassName"] == "efs"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rules_are_prometheus_own(overlay: str) -> None:
    (rule,) = of_kind(overlay, "PrometheusRule")
    files = sorted((FOLDER / "prometheus" / "rules").glob("*.yml"))
    assert rule["spec"]["groups"] == [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]


def test_alerts_link_to_the_runbook_where_people_reach_it() -> None:
    def links(kind: str, **deploy: Any) -> set[str]:
        files = render(kind, Settings(model="demo", deploy=deploy), [])
        text = "".join(text for name, text in files.items() if "rule" in name)
        return set(re.findall(r"runbook_url: (\S+)#\w+", text))

    for kind in ("k8s", "compose", "helm"):
        assert links(kind) == {"docs/runbook.md"}
        assert links(kind, runbook="https://wiki.example.com/synthia") == {"https://wiki.example.com/synthia"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_grafanas_sidecar_finds_every_dashboard(overlay: str) -> None:
    maps = [one for one in of_kind(overlay, "ConfigMap") if "grafana_dashboard" in one["metadata"]["labels"]]
    assert all(one["metadata"]["labels"]["grafana_dashboard"] == "1" for one in maps)
    found = {name: json.loads(text) for one in maps for name, text in one["data"].items()}
    files = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
    assert found == {path.name: json.loads(path.read_text()) for path in files}
    assert found


def test_a_kustomization_that_is_not_understood_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\nnamePrefix: x-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        build(tmp_path)
